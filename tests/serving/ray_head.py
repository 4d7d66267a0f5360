"""A Ray head as `ray start --head` makes it, but on loopback, and of which nothing stays."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpray.config import stay_quiet
from tpray.group import watchdog

START = "from tpray.group.cluster import _stay_on_loopback as s; s(); from ray.scripts.scripts import main; main()"


@contextmanager
def ray_head(port: int, cpus: int, *arguments: str, **environ: str) -> Iterator[None]:
    """A head at 127.0.0.1:``port`` within the block; ``arguments`` are more of those that `ray start` takes.

    Ray's own way to end it ends every Ray of the machine, by name; here what was started is known by a mark.
    """
    mark, since = secrets.token_hex(16), time.time() - 1
    paths = [str(Path(__file__).parent / "loopback_site"), environ.pop("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
    variables = os.environ | environ | {
        watchdog.MARK: mark, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    stay_quiet(variables)
    command = [
        sys.executable, "-c", START, "start", "--head", f"--port={port}", f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1", *arguments,
    ]  # fmt: skip
    starter = subprocess.Popen(command, env=variables, stdout=sys.stderr)
    try:
        assert starter.wait(timeout=90) == 0
        yield
    finally:
        watchdog.clean_up(mark, Path("/tmp/ray"), starter.pid, since, ended_well=not os.environ.get("KEEP_LOGS"))
