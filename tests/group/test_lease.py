"""Leases of cores."""

from __future__ import annotations

from pathlib import Path

from tpray.group import lease


def test_a_lease_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    ranges = [(0, 1), (2, 3)]
    first, second = lease.take_cores(ranges, tmp_path), lease.take_cores(ranges, tmp_path)
    assert first is not None
    assert second is not None
    assert (first.ids, second.ids) == ((0, 1), (2, 3))
    assert lease.take_cores(ranges, tmp_path) is None
    first.release()
    third = lease.take_cores(ranges, tmp_path)
    assert third is not None
    assert third.ids == (0, 1)
