"""A claim on CPU cores, or on ports. Ray counts CPUs but hands out no ids, so ranks agree among themselves.

A core is claimed by an exclusive `flock` on a file of its own. The kernel drops the lock when its holder
dies, however it dies, so a lease cannot be left behind; the empty files are.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tpray.errors import PlacementError


class Lease:
    """Cores, or ports, that this process has claimed; `release` gives them back, and so does its death."""

    def __init__(self, ids: tuple[int, ...], fds: list[int]) -> None:
        self.ids = ids
        self._fds = fds

    def release(self) -> None:
        """Give them back."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


PORTS = range(61100, 61700)
"""Where groups meet: above what Linux gives to outgoing connections, 32768 to 60999 unless told otherwise."""


def take_ports() -> Lease:
    """Claim two ports of this machine, next to one another, that nobody listens on and no other group has.

    A claim is an abstract Unix address, which is the machine's and not a cache folder's, and ends with its holder.

    Raises:
        PlacementError: there are none.
    """
    for port in PORTS[::2]:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0tpray-port-{port}")
        except OSError:
            claim.close()
            continue
        if _is_free(port) and _is_free(port + 1):
            return Lease((port, port + 1), [claim.detach()])
        claim.close()
    raise PlacementError(f"ports {PORTS.start} to {PORTS.stop - 1} are all in use: end what listens on them")


def _is_free(port: int) -> bool:
    """On every address, since torch's process group listens on all of them."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def take_cores(ranges: Sequence[tuple[int, ...]], folder: Path) -> Lease | None:
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
            return Lease(cores, fds)
        Lease(cores, fds).release()
    return None
