"""How long a step may take, by how long steps took.

So a rank that hangs is found long before its requests expire, and these are answered once the group is rebuilt.
"""

from __future__ import annotations

from typing import NamedTuple

MEASURED = 8
"""Steps to have been measured before a limit follows from them: the first ones touch memory, and may compile."""
FACTOR = 20.0
"""A step is late when it takes so many times as long as the slowest of the recent ones of its size."""
FLOOR_S = 5.0
"""And no sooner than this: a busy machine may hold a rank up for a while."""
GRACE_FACTOR = 4.0
GRACE_S = 0.5
"""Once a rank has raised, the others get so many times a step's time, and at least so long, to raise the same."""
_DECAY = 1 / 16


class Limits(NamedTuple):
    """Of one step, seconds. answer_s: for all ranks to answer it. grace_s: for the others, once one of them raised."""

    answer_s: float
    grace_s: float


class Pace:
    """The recent step times of a group, by the size of a step: an upper envelope that sinks slowly.

    A size is the number of tokens; those between two powers of 2 are one class. A step is expected to take no longer
    than steps of its own class, or of the next larger that was measured. There may be none, and too few steps at first;
    then only the ceiling holds.
    """

    def __init__(self) -> None:
        self._slowest_s: dict[int, float] = {}
        self._measured = 0

    def measure(self, size: int, seconds: float) -> None:
        """Take note of a step that was answered. seconds: from when the ranks could begin it."""
        known = self._slowest_s.get(_class(size), 0.0)
        self._slowest_s[_class(size)] = max(seconds, known + (seconds - known) * _DECAY)
        self._measured += 1

    def expected_s(self, size: int) -> float | None:
        """The longest that a step of that size is expected to take; None: that is not known."""
        if self._measured < MEASURED:
            return None
        larger = [known for known in self._slowest_s if known >= _class(size)]
        return self._slowest_s[min(larger)] if larger else None

    def limits(self, size: int | None, ceiling_s: float) -> Limits:
        """The limits of a step of that size, never above the ceiling; None: of a step that is unlike others."""
        expected_s = None if size is None else self.expected_s(size)
        if expected_s is None:
            return Limits(ceiling_s, min(ceiling_s, FLOOR_S))
        answer_s = min(ceiling_s, max(FLOOR_S, FACTOR * expected_s))
        return Limits(answer_s, min(answer_s, max(GRACE_S, GRACE_FACTOR * expected_s)))


def _class(size: int) -> int:
    """Sizes from 257 to 512, say, are one."""
    return (size - 1).bit_length()
