"""A rank's claim on CPU cores. Ray counts CPUs but hands out no ids, so ranks agree among themselves.

A core is claimed by an exclusive `flock` on a file of its own. The kernel drops the lock when its holder
dies, however it dies, so a lease cannot be left behind; the empty files are.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path


class CoreLease:
    """Cores that this process has claimed; `release` gives them back, and so does its death."""

    def __init__(self, cores: tuple[int, ...], fds: list[int]) -> None:
        self.cores = cores
        self._fds = fds

    def release(self) -> None:
        """Give the cores back."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def take(ranges: Sequence[tuple[int, ...]], folder: Path) -> CoreLease | None:
    """Claim the first of ``ranges`` whose cores are all free; None when there is none."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for cores in ranges:
        fds: list[int] = []
        for core in cores:
            fd = os.open(folder / f"core-{core}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fds.append(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
        else:
            return CoreLease(cores, fds)
        CoreLease(cores, fds).release()
    return None
