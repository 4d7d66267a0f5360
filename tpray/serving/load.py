"""What a group has done: of late second by second, which the page draws, and since the start, for `metrics`."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from tpray.errors import (
    DeadlineError,
    GroupError,
    InputError,
    InputTooLongError,
    LogitsError,
    MisdirectedError,
    OverloadedError,
    PayloadTooLargeError,
    RateLimitError,
    RefusedError,
    StepError,
    StoppingError,
    UnauthorizedError,
    UnknownModelError,
    UnsupportedTaskError,
)
from tpray.serving.waiting import ClientLeftError

HANDLE = "Python handle"
"""What takes the place of a dialect for the calls of one."""

KEPT_S = 300
"""How many seconds are kept."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The upper bounds of histograms' buckets."""

REASONS: tuple[tuple[type[Exception], str], ...] = (
    (RateLimitError, "key_limit"),
    (OverloadedError, "overloaded"),
    (DeadlineError, "deadline"),
    (UnauthorizedError, "unauthorized"),
    (StoppingError, "stopping"),
    (MisdirectedError, "misdirected"),
    (UnknownModelError, "unknown_model"),
    (UnsupportedTaskError, "unsupported_task"),
    (PayloadTooLargeError, "too_large"),
    (InputTooLongError, "too_long"),
    (InputError, "invalid"),
    (ValidationError, "invalid"),
    (LogitsError, "not_finite"),
    (StepError, "step_failed"),
    (RefusedError, "refused_row"),
    (GroupError, "group_down"),
    (ClientLeftError, "client_left"),
    (Exception, "internal"),
)
"""Why a request was not answered; the first that matches."""


class Histogram:
    """How often values were at most each of ``bounds``, and above the one before; the last count is of larger ones."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """A value was seen."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class Second:
    """The steps that ended within one second. number: of the clock. compute_s: what rank 0's program took in them."""

    number: int
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    compute_s: float = 0.0


class Load:
    """The last `KEPT_S` seconds of a group, and what it did since the start. Used on one event loop.

    Seconds in which no step ended are not there.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[Second] = deque([Second(-1)], KEPT_S)
        self.requests: Counter[tuple[str, int | str, str]] = Counter()
        """How many were answered, by dialect, status and the name of their key; "": without one."""
        self.refusals: Counter[str] = Counter()
        """How many of those that classify, or were not let in, were answered with an error, by its reason."""
        self.tokens_without_key = 0
        """Tokens of the texts of requests for which no key pays."""
        self.rows = self.tokens = self.padding = 0
        """What answered steps had: rows, their tokens, and what these were padded with."""
        self.steps_halved = 0
        """How many steps all ranks raised in, which were run again in halves."""
        self.replays = self.poison_rows = self.rows_not_finite = 0
        """Rows that were put back since the group failed; that are refused from then on; with a NaN or an infinity."""
        self.request_s: dict[str, Histogram] = {}
        """By dialect."""
        self.tokenize_s, self.queue_s, self.step_s = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)
        self.step_rows, self.step_fill = Histogram(ROWS), Histogram(SHARES)

    @property
    def now(self) -> int:
        """The number of this second, which is not over yet."""
        return int(self._clock())

    def add(
        self, rows: int, tokens: int, compute_s: float, total_s: float = 0.0, padding: int = 0, fill: float = 0.0
    ) -> None:
        """A step was answered. It costs about a microsecond, for it is called after each.

        Args:
            tokens: of the rows; padding: computed beside them. total_s: how long the step took, once begun.
            fill: its tokens over the most that a step may have.
        """
        number, last = int(self._clock()), self._seconds[-1]
        if last.number != number:
            last = Second(number)
            self._seconds.append(last)
        last.steps += 1
        last.rows += rows
        last.tokens += tokens
        last.compute_s += compute_s
        self.rows += rows
        self.tokens += tokens
        self.padding += padding
        self.step_s.add(total_s)
        self.step_rows.add(rows)
        self.step_fill.add(fill)

    def answered(
        self, dialect: str, status: int | str, key: str, seconds: float, error: Exception | None = None
    ) -> None:
        """A request was answered, with an error or without; about a microsecond."""
        self.requests[dialect, status, key] += 1
        histogram = self.request_s.get(dialect)
        if histogram is None:
            histogram = self.request_s[dialect] = Histogram(SECONDS)
        histogram.add(seconds)
        if error is not None:
            self.refusals[next(reason for cls, reason in REASONS if isinstance(error, cls))] += 1

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
