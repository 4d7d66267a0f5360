"""Rows as they wait for their step, and how steps are cut from them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpray.errors import ItemError
from tpray.group.wire import Array
from tpray.runtime.buckets import Bucket, largest_batch
from tpray.serving.request_notes import NOTES, RequestNotes
from tpray.tokenizer import Encoded


@dataclass(slots=True, eq=False)
class StepAnswer:
    """What a step's rows share: logits float32 ``[B, L]``, or ``[B, S, L]``, and how long it computed.

    scores: what was made of the logits of all rows, by the activation, when the first of them was asked for.
    """

    logits: Array
    compute_s: float
    scores: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(slots=True)
class RowResult:
    """One row's answer: which row of a step it was, and its seconds in the queue."""

    step: StepAnswer
    row: int
    queue_s: float

    @property
    def logits(self) -> Array:
        """float32 ``[L]``; of a classifier of tokens ``[S, L]``, the row's own first."""
        logits: Array = self.step.logits[self.row]
        return logits


@dataclass(slots=True, eq=False)
class QueuedRow:
    """A row in the queue. Times are `time.monotonic` seconds.

    suspected: to be run while nothing else is under way. notes: of the request that makes it, if any are taken.
    """

    encoded: Encoded
    future: asyncio.Future[RowResult]
    arrived: float
    deadline: float
    suspected: bool = False
    notes: RequestNotes | None = field(default_factory=NOTES.get)

    def __len__(self) -> int:
        return len(self.encoded)


def cut_steps(rows: Iterable[QueuedRow], max_step_tokens: int, max_padding: float) -> list[list[QueuedRow]]:
    """Cut rows into steps: sorted by length, each step within the token limit and the padding limit.

    A row longer than the limit gets a step of its own. The step with the oldest row comes first.
    """
    steps: list[list[QueuedRow]] = []
    used = 0
    for row in sorted(rows, key=len):
        padded = len(row) * (len(steps[-1]) + 1) if steps else 0
        if steps and padded <= max_step_tokens and used + len(row) >= padded * (1 - max_padding):
            steps[-1].append(row)
            used += len(row)
        else:
            steps.append([row])
            used = len(row)
    return sorted(steps, key=lambda step: min(row.arrived for row in step))


def cut_into_buckets(rows: Iterable[QueuedRow], buckets: Sequence[Bucket]) -> list[list[QueuedRow]]:
    """Cut rows into steps of one bucket each: rows that share the shortest bucket that holds them go together."""
    together: dict[int, list[QueuedRow]] = {}
    for row in rows:
        length = min(bucket.length for bucket in buckets if bucket.length >= len(row))
        together.setdefault(length, []).append(row)
    steps = []
    for length, group in together.items():
        size = largest_batch(buckets, length)
        steps += [group[start : start + size] for start in range(0, len(group), size)]
    return sorted(steps, key=lambda step: min(row.arrived for row in step))


async def results_of(futures: list[asyncio.Future[RowResult]]) -> list[RowResult]:
    """What the rows of a request are answered with; the first that failed, as soon as one has, speaks for all."""
    if len(futures) > 1:
        await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    results = []
    for number, future in enumerate(futures):
        if len(futures) > 1 and not future.done():
            continue  # another one has failed
        try:
            results.append(await future)
        except ItemError as e:
            raise type(e)(e.message, number) from e
    return results


def tokens_in(rows: Iterable[QueuedRow]) -> int:
    """How many tokens the rows have together, without padding."""
    return sum(map(len, rows))
