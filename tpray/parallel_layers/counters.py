"""How far each rank has come in the shared memory's collectives, for the group's owner. No torch.

The memory begins with a cache line for each rank, of int64: how many exchanges it has entered, and how many nanoseconds
it has waited in them for the others.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection

LINE = 64
"""Bytes between counters, so that no two ranks write to one cache line."""


def read_counters(fd: int, size: int) -> list[int]:
    """How many exchanges each of ``size`` ranks has entered; [] if they have not made the memory ``fd``."""
    return _read(fd, size, 0)


def read_waits_s(fd: int, size: int) -> list[float]:
    """How long each of ``size`` ranks has waited for the others since it came up; [] as for `read_counters`."""
    return [waited_ns / 1e9 for waited_ns in _read(fd, size, 1)]


def _read(fd: int, size: int, place: int) -> list[int]:
    memory = os.pread(fd, size * LINE, 0)
    if len(memory) < size * LINE:
        return []  # their collective is another
    return [struct.unpack_from("q", memory, rank * LINE + 8 * place)[0] for rank in range(size)]


def furthest_behind(counters: list[int], ranks: Collection[int]) -> list[int]:
    """Those of ``ranks`` for which the others wait; [] if no counter tells them apart."""
    if not counters:
        return []
    least = min(counters[rank] for rank in ranks)
    behind = [rank for rank in sorted(ranks) if counters[rank] == least]
    return behind if len(behind) < len(ranks) else []
