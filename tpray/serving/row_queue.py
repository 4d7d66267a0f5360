"""A queue that knows how many tokens it holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sized
from typing import Generic, TypeVar

Row = TypeVar("Row", bound=Sized)


class RowQueue(Generic[Row]):
    """Rows in their order. ``tokens`` is the sum of their lengths, kept and not counted: every request asks for it."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first(self) -> Row:
        """The oldest row; there must be one."""
        return self._rows[0]

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows at the end."""
        for row in rows:
            self._rows.append(row)
            self.tokens += len(row)

    def put_back(self, rows: Iterable[Row], arrived: Callable[[Row], float]) -> None:
        """Put rows back to where they were, by when each ``arrived``."""
        self._rows = deque(sorted((*rows, *self._rows), key=arrived))
        self.tokens = sum(map(len, self._rows))

    def popleft(self) -> Row:
        """Take the oldest row; there must be one."""
        row = self._rows.popleft()
        self.tokens -= len(row)
        return row

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Let go of the rows that are not ``wanted``."""
        self._rows = deque(filter(wanted, self._rows))
        self.tokens = sum(map(len, self._rows))

    def clear(self) -> None:
        """Let go of all rows."""
        self._rows.clear()
        self.tokens = 0
