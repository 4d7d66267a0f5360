"""Claims on what a machine has once: cores and ports. Ray counts CPUs but hands out no ids, and knows no ports.

A claim is an abstract Unix address. It is the machine's, whichever cache folder or user a process has; the kernel drops
it when its last holder dies, however it dies, so that nothing is left behind.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from tpray.errors import PlacementError


class Lease:
    """Cores, or ports, that this process has claimed; `release` gives them back, and so does its death.

    ``fds`` are the claims: whoever inherits them holds the lease as well.
    """

    def __init__(self, ids: tuple[int, ...], claims: Sequence[socket.socket]) -> None:
        self.ids = ids
        self.fds = tuple(claim.detach() for claim in claims)

    def release(self) -> None:
        """Give them back."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


GROUP_PORTS = range(61100, 61700)
"""Where groups meet: above what Linux gives to outgoing connections, 32768 to 60999 unless told otherwise."""

SERVER_PORTS = range(20000, 30000)
"""Where a server's own processes reach one another: below those."""


def take_ports(count: int, ports: range) -> Lease:
    """Claim ``count`` ports in a row, out of ``ports``, that nobody listens on and nobody else has claimed.

    Raises:
        PlacementError: there are none.
    """
    for first in range(ports.start, ports.stop - count + 1, count):
        claim = _claim(f"port-{first}")
        if claim is None:
            continue
        run = tuple(range(first, first + count))
        if all(map(_is_free, run)):
            return Lease(run, [claim])
        claim.close()
    raise PlacementError(
        f"of the ports {ports.start} to {ports.stop - 1} no {count} in a row are free: end what listens on them"
    )


def take_cores(ranges: Sequence[tuple[int, ...]]) -> Lease | None:
    """Claim the first of ``ranges`` whose cores are all free; None when there is none."""
    for cores in ranges:
        claims: list[socket.socket] = []
        while len(claims) < len(cores) and (claim := _claim(f"core-{cores[len(claims)]}")) is not None:
            claims.append(claim)
        if len(claims) == len(cores):
            return Lease(cores, claims)
        for claim in claims:
            claim.close()
    return None


def _claim(what: str) -> socket.socket | None:
    """The claim on ``what``; None if somebody has it."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0tpray-{what}")
    except OSError:
        claim.close()
        return None
    return claim


def _is_free(port: int) -> bool:
    """On every address, since torch's process group listens on all of them."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
