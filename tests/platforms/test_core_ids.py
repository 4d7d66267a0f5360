"""Core ids: runs, shares, and how they are written."""

from __future__ import annotations

from tpray.platforms import cores


def test_core_ranges_have_no_gaps() -> None:
    assert cores.cut_ranges([0, 1, 2, 4, 5, 6, 7], 2) == [(0, 1), (4, 5), (6, 7)]
    assert cores.cut_ranges([3], 2) == []
    assert cores.describe([0, 1, 2, 5]) == "0-2,5"
    assert [cores.share_of_cores(8, n) for n in (1, 3, 16)] == [8, 2, 1]
