"""A Ray head as `ray start --head` makes it, but on loopback, and of which nothing stays."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpray.config import stay_quiet
from tpray.local_ray import watchdog

ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's own switch for machines without clusters: it then takes 127.0.0.1 for this machine's address.

It is read when Ray is imported, by each of its processes.
"""


@contextmanager
def ray_head(port: int, cpus: int, *arguments: str, **environ: str) -> Iterator[None]:
    """A head at 127.0.0.1:``port`` within the block; ``arguments`` are more of those that `ray start` takes.

    Ray's own way to end it ends every Ray of the machine, by name; here what was started is known by a mark.
    """
    mark, since = secrets.token_hex(16), time.time() - 1
    variables = os.environ | environ | ON_LOOPBACK | {watchdog.MARK: mark, "RAY_AUTH_MODE": "disabled"}
    stay_quiet(variables)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", f"--num-cpus={cpus}"]
    with tempfile.TemporaryFile("w+") as said:  # a pipe would stay open as long as the head runs
        starter = subprocess.Popen([*command, *arguments], env=variables, stdout=said, stderr=said)
        try:
            if starter.wait(timeout=90) != 0:
                said.seek(0)
                raise AssertionError(said.read())
            yield
        finally:
            logs_go = not os.environ.get("KEEP_LOGS")
            watchdog.clean_up(mark, Path("/tmp/ray"), starter.pid, since, ended_well=logs_go)
            Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # as `ray stop` does
