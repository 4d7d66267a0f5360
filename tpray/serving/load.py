"""What a group has done of late, second by second: what the page draws."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

KEPT_S = 300
"""How many seconds are kept."""


@dataclass(slots=True)
class Second:
    """The steps that ended within one second. number: of the clock. compute_s: what rank 0's program took in them."""

    number: int
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    compute_s: float = 0.0


class Load:
    """The last `KEPT_S` seconds of a group. Seconds in which no step ended are not there.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[Second] = deque([Second(-1)], KEPT_S)
        self.rows_not_finite = 0
        """How many rows got logits that are NaN or infinite, since the start."""

    @property
    def now(self) -> int:
        """The number of this second, which is not over yet."""
        return int(self._clock())

    def add(self, rows: int, tokens: int, compute_s: float) -> None:
        """A step was answered. It costs a microsecond, for it is called after each."""
        number, last = int(self._clock()), self._seconds[-1]
        if last.number != number:
            last = Second(number)
            self._seconds.append(last)
        last.steps += 1
        last.rows += rows
        last.tokens += tokens
        last.compute_s += compute_s

    def tokens_within(self, seconds: int) -> int:
        """Tokens of the steps that ended in the last ``seconds``."""
        return sum(each.tokens for each in self._seconds if each.number > self.now - seconds)

    def between(self, first: int, end: int) -> list[tuple[int, int, int, int, float]]:
        """The kept seconds from ``first`` on and before ``end``: number, steps, rows, tokens, seconds computed."""
        first = max(first, end - KEPT_S)
        return [
            (each.number, each.steps, each.rows, each.tokens, round(each.compute_s, 6))
            for each in self._seconds
            if first <= each.number < end
        ]
