"""The rows that wait, and whose turn it is.

A short row that arrives behind a long one waits for it, and in one queue behind every long row that came before: a
convoy. So rows wait in two lanes, each in the order of arrival:

- With a long row go twice as many tokens of short ones, while both wait: long rows take a third of the time from short
  ones, and these no more than two thirds from them. None starves. A step of few tokens counts as `STEP_TOKENS`.
- While there are short rows about, long ones go one at a time, and none is sent ahead of need behind a step under way
  when it is not its turn: a short row that arrives waits for one long row at most.

Without long rows, or without short ones, this is one queue, first come, first served. The rule between the lanes is
deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) with two flows.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import chain
from typing import Generic, Protocol, TypeVar

ABOUT_S = 1.0
"""Short rows are about until none has come for so long."""


SHORT_SHARE = 2
"""How many tokens of short rows go with each of a long one, while both wait."""

STEP_TOKENS = 32
"""A step of fewer tokens takes as long as one of so many: it reads all weights. (Measured on CPU cores, a decoder of
0.6 B's shape: 8 tokens take what 29 cost in a long row in float32, and 32 in bfloat16.)"""


class Queueable(Protocol):
    """A row. arrived: seconds of the queue's clock. suspected: it is run by itself, with nothing else under way."""

    arrived: float
    suspected: bool

    def __len__(self) -> int: ...


Row = TypeVar("Row", bound=Queueable)


class Lane(Enum):
    """Of the queue: rows in it go together."""

    SHORT = "short"
    LONG = "long"
    SUSPECT = "suspect"


class RowQueue(Generic[Row]):
    """Rows in lanes. ``tokens`` is the sum of their lengths, kept and not counted: every request asks for it.

    Args:
        wanted: whether somebody still waits for a row.
        long_tokens: rows of more tokens are long.
        clock: the time in seconds.
    """

    def __init__(
        self,
        wanted: Callable[[Row], bool],
        long_tokens: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.long_tokens, self.tokens = long_tokens, 0
        self._wanted, self._clock = wanted, clock
        self._lanes: dict[Lane, deque[Row]] = {lane: deque() for lane in Lane}
        self._owed = 0  # tokens of short rows that go before the next long one
        self._short_came = -math.inf

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Row]:
        return chain(*self._lanes.values())

    def is_long(self, row: Row) -> bool:
        return len(row) > self.long_tokens

    @property
    def short_about(self) -> bool:
        """Whether a short row has come of late."""
        return self._clock() - self._short_came < ABOUT_S

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows at the end."""
        for row in rows:
            lane = Lane.SUSPECT if row.suspected else Lane.LONG if self.is_long(row) else Lane.SHORT
            self._lanes[lane].append(row)
            self.tokens += len(row)
            if lane is Lane.SHORT:
                self._short_came = self._clock()

    def put_back(self, rows: Iterable[Row]) -> None:
        """Put rows back to where they were, by when each arrived."""
        waiting = sorted((*rows, *self), key=lambda row: row.arrived)
        self.clear()
        self.extend(waiting)

    def turn(self, busy: bool, long_under_way: bool) -> Lane | None:
        """Which lane goes next; None: there is none, or it is better to wait for the end of a step.

        Args:
            busy: whether a step is under way; then there will be another turn.
            long_under_way: whether that, or one of those, is of long rows.
        """
        for rows in self._lanes.values():
            while rows and not self._wanted(rows[0]):
                self.tokens -= len(rows.popleft())
        short, long, suspects = (self._lanes[lane] for lane in Lane)
        if suspects and all(suspects[0].arrived <= rows[0].arrived for rows in (short, long) if rows):
            return None if busy else Lane.SUSPECT
        if not long:
            return Lane.SHORT if short else None
        if short:
            before = long_under_way or self._owed > 0 or short[0].arrived <= long[0].arrived
            return Lane.SHORT if before else Lane.LONG
        ahead = busy and self.short_about and (long_under_way or self._owed > 0)
        return None if ahead else Lane.LONG

    def take(self, lane: Lane, budget: int) -> list[Row]:
        """Take the oldest rows of a lane that somebody waits for, up to ``budget`` tokens and at least one.

        Of suspects, and of long rows while short ones are about, it is one.
        """
        if lane is Lane.SUSPECT or (lane is Lane.LONG and self.short_about):
            budget = 0
        rows, taken, tokens = self._lanes[lane], list[Row](), 0
        while rows and (not taken or tokens + len(rows[0]) <= budget):
            row = rows.popleft()
            self.tokens -= len(row)
            if self._wanted(row):
                taken.append(row)
                tokens += len(row)
        if lane is Lane.LONG:
            self._owed = SHORT_SHARE * tokens
        elif lane is Lane.SHORT:
            self._owed = max(0, self._owed - max(tokens, STEP_TOKENS))
        return taken

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Let go of the rows that are not ``wanted``."""
        for lane, rows in self._lanes.items():
            self._lanes[lane] = deque(filter(wanted, rows))
        self.tokens = sum(map(len, self))

    def clear(self) -> None:
        """Let go of all rows."""
        for lane in self._lanes.values():
            lane.clear()
        self.tokens = 0
