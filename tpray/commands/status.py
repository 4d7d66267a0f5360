"""``tpray status``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tpray.commands.console import print_status
from tpray.commands.flags import ClientKey
from tpray.errors import ConfigError, TprayError


def status(
    url: Annotated[
        str, typer.Argument(envvar="TPRAY_URL", help="Where a tpray server listens.")
    ] = "http://127.0.0.1:8000",
    api_key: ClientKey = None,
) -> None:
    """Ask a running server whether it is healthy, and what it serves."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from tpray.serving.client import KEY_STATUSES, bearer, key_wanted

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not a URL: it starts with http:// or https://")
    url = url.rstrip("/")
    try:
        shown = bearer(api_key)
        with urlopen(Request(f"{url}/info", headers=shown), timeout=10) as answer:
            info = json.load(answer)
        try:
            urlopen(Request(f"{url}/health", headers=shown), timeout=30).close()
            healthy = True
        except HTTPError:
            healthy = False
    except (URLError, OSError, ValueError) as e:
        if isinstance(e, HTTPError) and e.code in KEY_STATUSES:
            raise ConfigError(key_wanted(url)) from e
        reason = getattr(e, "reason", e)
        said = getattr(reason, "strerror", None) or reason
        raise TprayError(f"no tpray server answers at {url}: {said}; start one, or name where it listens") from e
    print_status(info, healthy)
    raise typer.Exit(0 if healthy else 1)
