"""The rows that were under way when a group failed: which of them is not to be run again.

A request that is sent again is a new row with the same tokens, so that rows are remembered by a digest of these.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from tpray.tokenizer import Encoded

EXPIRY_S = 600.0
"""How long after a failure its rows are remembered."""
REMEMBERED = 4096
"""How many rows are; the oldest are forgotten first."""
FAILURES = 2
"""How often a group may fail while it runs a row and nothing else, until the row is refused."""


class Suspects:
    """What is remembered of rows since they last did well.

    A row that was under way with others when the group failed is suspected: it may be what did it. Run by itself it
    either gets its answer, and is forgotten, or the group fails again, and then it was this row. Once that has happened
    `FAILURES` times the row is refused, until `EXPIRY_S` have passed.

    Args:
        clock: seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, int]] = OrderedDict()  # digest -> last failure, failures alone

    def __contains__(self, row: Encoded) -> bool:
        """Whether the row was under way in a failure, and got no answer since."""
        return self._failures(row) is not None

    def refuses(self, row: Encoded) -> bool:
        """Whether the row is not to be run."""
        return (self._failures(row) or 0) >= FAILURES

    def add(self, row: Encoded, alone: bool) -> None:
        """The group failed while it ran this row; alone: and nothing else."""
        failures = (self._failures(row) or 0) + alone
        digest = _digest(row)
        self._known[digest] = self._clock(), failures
        self._known.move_to_end(digest)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def clear(self, row: Encoded) -> None:
        """The row was answered."""
        self._known.pop(_digest(row), None)

    def _failures(self, row: Encoded) -> int | None:
        if not self._known:  # as good as always; it costs no digest
            return None
        since, failures = self._known.get(_digest(row), (float("-inf"), 0))
        return failures if self._clock() - since < EXPIRY_S else None


def _digest(row: Encoded) -> bytes:
    return hashlib.blake2b(np.array([row.ids, row.types], dtype=np.int64).tobytes(), digest_size=16).digest()
