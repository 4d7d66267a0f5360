"""Servers as users start them: the command in a process of its own; and the processes that belong to one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from ray._common.utils import get_default_ray_temp_dir

from tpray.local_ray import watchdog


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    log: Path
    started: float  # seconds since the epoch

    def predict(self, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", json=body, timeout=60, **options)

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = httpx.get(f"{self.url}/info", timeout=60).json()
        return info


def start(port: int, folder: Path, *args: str) -> Running:
    log = folder / f"serve-{port}.log"
    started = time.time()
    environ = os.environ | {"TPRAY_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tpray", "serve", "--port", str(port), *args],
        stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, env=environ,
    )  # fmt: skip
    give_up = time.monotonic() + 180
    while "Ready" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.2)
    return Running(process, f"http://127.0.0.1:{port}", log, started)


def children_of(pid: int) -> set[int]:
    """Every process whose chain of parents leads to ``pid``."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {pid}


def processes_of(server: Running, words: str) -> list[int]:
    """The processes of a server whose command line has ``words``, the oldest first."""
    found = []
    for pid in sorted(children_of(server.process.pid)):
        try:
            if words in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                found.append(pid)
        except OSError:  # it has just ended
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sessions_of(pid: int, since: float) -> list[Path]:
    """The folders that Ray made for a driver that was started after ``since``."""
    return watchdog.sessions_of(Path(get_default_ray_temp_dir()), pid, since)


def assert_all_gone(family: set[int], within_s: float) -> None:
    give_up = time.monotonic() + within_s
    while any(map(alive, family)) and time.monotonic() < give_up:
        time.sleep(0.1)
    left = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family if alive(pid)}
    assert not left
