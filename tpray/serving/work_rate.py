"""How fast a group works its queue off, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

MEMORY_S = 5.0
"""What was measured so long ago counts for 1/e; where nothing was measured for so long, the rate is not known."""
TRUSTED_S = 0.5
"""A rate from less work than this is not known yet: the first steps of a group are slow."""


class WorkRate:
    """Tokens per second of a group's time at work: an exponentially weighted mean.

    Only full steps are counted, those that left rows waiting. One short row takes nearly as long as a full step, so
    that a group with little to do would seem slow.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = self._work_s = 0.0
        self._since = self._measured = float("-inf")  # when the last step ended, or work began; the last full one

    def begin(self) -> None:
        """The group, which had nothing to do, gets a step."""
        self._since = self._clock()

    def add(self, tokens: int, full: bool) -> None:
        """A step has ended; those that are under way at once share their time."""
        now = self._clock()
        elapsed_s, self._since = now - self._since, now
        if full:
            keep = math.exp((self._measured - now) / MEMORY_S)
            self._tokens = self._tokens * keep + tokens
            self._work_s = self._work_s * keep + elapsed_s
            self._measured = now

    @property
    def tokens_per_s(self) -> float:
        """The rate of late; 0: it is not known."""
        known = self._work_s >= TRUSTED_S and self._clock() - self._measured <= MEMORY_S
        return self._tokens / self._work_s if known else 0.0

    def seconds_for(self, tokens: float) -> float:
        """How long so many tokens take; 0 where the rate is not known."""
        rate = self.tokens_per_s
        return tokens / rate if rate else 0.0
