"""How tpray was installed, for sentences that say what to install beside it."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit


def install_command(extra: str) -> str:
    """A command that installs an extra of tpray into this Python, from where tpray itself came."""
    return f"{shlex.quote(sys.executable)} -m pip install {_requirement(extra)}"


def _requirement(extra: str) -> str:
    """As pip takes it: a clone that is installed with ``-e`` stays so.

    Source: PEP 610, ``direct_url.json``. A package from an index has none.
    """
    try:
        noted = distribution("tpray").read_text("direct_url.json")
    except PackageNotFoundError:
        noted = None
    if noted is None:
        return f"'tpray[{extra}]'"
    origin = json.loads(noted)
    if origin.get("dir_info", {}).get("editable"):
        return "-e " + shlex.quote(f"{unquote(urlsplit(origin['url']).path)}[{extra}]")
    vcs = origin.get("vcs_info")
    where = f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"]
    return shlex.quote(f"tpray[{extra}] @ {where}")
