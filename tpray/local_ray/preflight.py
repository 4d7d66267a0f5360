"""What a Ray needs of this machine, looked at before it is started: a fault is one sentence, not Ray's timeout."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from tpray.errors import ConfigError
from tpray.ray_private import ray_folder

OPEN_FILES = 65536
"""How many files a process of Ray, or HAProxy, may open, where the machine lets it."""
LEAST_OPEN_FILES = 1024
LEAST_FREE_BYTES = 100 * 2**20
"""Of the disk that has Ray's logs and sockets."""
LONGEST_SESSION = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""How long the name of Ray's folder may be: the path of a Unix socket has at most 107 bytes, see unix(7)."""
LONGEST_FOLDER = 97 - len("/tpray-xxxxxxxx//metrics.sock") - 56
"""The same for HAProxy's folder: it allows 97, and Serve adds a node's id of 56."""


def check_machine() -> None:
    """Raise `ConfigError` for what would keep Ray from starting, or from running for long."""
    folder = ray_folder()
    hint = "set RAY_TMPDIR to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise ConfigError(f"Ray cannot write to its folder {folder} ({e.strerror or e}): {hint}") from e
    if free < LEAST_FREE_BYTES:
        raise ConfigError(f"the disk of Ray's folder {folder} has {free >> 20} MiB left: free some, or {hint}")
    if len(os.fsencode(folder)) > LONGEST_SESSION:
        raise ConfigError(f"the name of Ray's folder {folder} is too long for a socket in it: {hint}")
    _raise_open_files()


def _raise_open_files() -> None:
    """Let this process, and those that it starts, open as many files as they may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if allowed < LEAST_OPEN_FILES:
        raise ConfigError(
            f"this process may open {allowed} files and Ray needs {LEAST_OPEN_FILES}: allow more, with `ulimit -n "
            f"{OPEN_FILES}` or your container's or service's limit"
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def make_folder() -> Path:
    """A new folder for the files and sockets of one server, and for the script that starts HAProxy."""
    default = tempfile.gettempdir()
    parent = default if len(os.fsencode(default)) <= LONGEST_FOLDER else "/tmp"
    try:
        if os.statvfs(parent).f_flag & os.ST_NOEXEC:
            raise ConfigError(
                f"{parent} is mounted so that no program in it is run (noexec): set TMPDIR to a folder with a short "
                "name where they are, or, in a container, mount it with exec, as in `docker run --tmpfs /tmp:exec`"
            )
        return Path(tempfile.mkdtemp(prefix="tpray-", dir=parent))
    except OSError as e:
        raise ConfigError(
            f"a folder for the server's sockets cannot be made ({e}): set TMPDIR to a folder with a short name"
        ) from e
