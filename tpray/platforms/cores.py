"""Cores: how many may be used and which, which are neighbours, how their ids are written.

Source: sched_getaffinity(2).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tpray.platforms.memory import core_limit


def usable_cores() -> list[int]:
    """The ids of the cores this process may run on, ascending (`sched_getaffinity`)."""
    return sorted(os.sched_getaffinity(0))


def core_count() -> int:
    """How many cores' time this process may use: fewer than it may run on where a control group limits that."""
    return min(len(usable_cores()), core_limit() or sys.maxsize)


def share_of_cores(cores: int, ranks: int) -> int:
    """The machine's cores shared out among all its ranks, at least one each."""
    return max(1, cores // ranks)


def cut_ranges(cores: Sequence[int], width: int) -> list[tuple[int, ...]]:
    """Cut core ids into runs of ``width`` that follow one another, so that a rank's threads are neighbours.

    A gap in the ids ends a run; what is left over of one is not used.
    """
    ranges: list[tuple[int, ...]] = []
    run: list[int] = []
    for core in sorted(cores):
        if run and core != run[-1] + 1:
            run = []
        run.append(core)
        if len(run) == width:
            ranges.append(tuple(run))
            run = []
    return ranges


def describe(cores: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` -> ``"0-2,5"``, as Linux writes core lists."""
    parts: list[str] = []
    ids = sorted(cores)
    for i, core in enumerate(ids):
        if i and core == ids[i - 1] + 1:
            parts[-1] = f"{parts[-1].split('-')[0]}-{core}"
        else:
            parts.append(str(core))
    return ",".join(parts)


def is_run(ids: Sequence[int]) -> bool:
    """Whether ascending ``ids`` follow one another without a gap."""
    return list(ids) == list(range(ids[0], ids[0] + len(ids)))


def is_aligned(ids: Sequence[int]) -> bool:
    """Whether ascending ``ids`` are a run that begins at a multiple of its length, where NeuronCores run best."""
    return is_run(ids) and ids[0] % len(ids) == 0
