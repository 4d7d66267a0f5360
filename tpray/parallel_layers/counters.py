"""How far each rank has come in the shared memory's collectives, for the group's owner. No torch.

The memory begins with one counter a rank, int64, on a cache line of its own: how many exchanges it has entered.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection

LINE = 64
"""Bytes between counters, so that no two ranks write to one cache line."""


def read_counters(fd: int, size: int) -> list[int]:
    """The counters of ``size`` ranks in the memory ``fd``; [] if they have not made it: their collective is another."""
    memory = os.pread(fd, size * LINE, 0)
    return (
        [struct.unpack_from("q", memory, rank * LINE)[0] for rank in range(size)] if len(memory) == size * LINE else []
    )


def furthest_behind(counters: list[int], ranks: Collection[int]) -> list[int]:
    """Those of ``ranks`` for which the others wait; [] if no counter tells them apart."""
    if not counters:
        return []
    least = min(counters[rank] for rank in ranks)
    behind = [rank for rank in sorted(ranks) if counters[rank] == least]
    return behind if len(behind) < len(ranks) else []
