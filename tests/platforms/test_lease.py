"""Leases of cores and ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tpray.errors import PlacementError
from tpray.platforms import lease

RANGES = [(9000, 9001), (9002, 9003)]  # no machine has such cores, so that no group has them either
PORTS = range(19000, 19020)


def test_cores_are_leased_to_one_until_it_releases_them() -> None:
    first, second = lease.take_cores(RANGES), lease.take_cores(RANGES)
    assert first is not None
    assert second is not None
    assert [first.ids, second.ids] == RANGES
    assert lease.take_cores(RANGES) is None
    first.release()
    third = lease.take_cores(RANGES)
    assert third is not None
    assert third.ids == (9000, 9001)
    second.release()
    third.release()


def test_a_range_is_leased_whole_or_not_at_all() -> None:
    second_core = lease.take_cores([(9001,)])
    assert second_core is not None
    assert lease.take_cores([(9000, 9001)]) is None
    second_core.release()
    both = lease.take_cores([(9000, 9001)])
    assert both is not None
    both.release()


def test_ports_are_leased_to_one_and_only_where_nobody_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 19003))
        listener.listen()
        first, second = lease.take_ports(5, PORTS), lease.take_ports(5, PORTS)
        assert (first.ids[0], second.ids[0]) == (19005, 19010)
        third = lease.take_ports(5, PORTS)
        with pytest.raises(PlacementError, match="no 5 in a row are free"):
            lease.take_ports(5, PORTS)
        for taken in (first, second, third):
            taken.release()


def test_a_lease_lives_as_long_as_its_last_holder() -> None:
    """A server's watchdog inherits its ports, so that nobody gets them while the server's processes still end."""
    taken = lease.take_ports(20, PORTS)
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=taken.fds
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    taken.release()
    with pytest.raises(PlacementError):
        lease.take_ports(20, PORTS)
    os.kill(holder.pid, 9)
    holder.communicate()
    lease.take_ports(20, PORTS).release()
