"""One bounded queue in front of a group, and how steps are formed from it.

When the group can take a step, and not before, the oldest rows up to a token budget leave the queue. A group whose
program packs rows takes them as they came; for any other they are sorted by length and cut into steps whose padding
is bounded. Two steps are in flight, so that the ranks never wait for this process. Rows whose caller left, or whose
time ran out, cost no step. Rows of a step that died with its group go back to the head of the queue, once; while the
group restarts all rows wait there.

Iteration-level batching of a queue by tokens is TEI's and Orca's (Yu et al., OSDI 2022) idea; an encoder needs
one step a row, so what remains of it is to form a batch only when it can start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tpray.config import BatchConfig
from tpray.errors import DeadlineError, GroupError, ItemError, LogitsError, NotReadyError, OverloadedError
from tpray.group.channel import StepResult
from tpray.group.lifecycle import Lifecycle, State
from tpray.group.wire import Array
from tpray.runtime.buckets import Bucket, largest_batch
from tpray.tokenizer import Encoded, pad

log = logging.getLogger(__name__)

NOT_FINITE = (
    "gets logits that are not finite (NaN or infinite) from this model: its weights are damaged, or --dtype is too "
    "narrow for them; try --dtype float32"
)


class Steps(Protocol):
    """What a batcher needs of a group."""

    lifecycle: Lifecycle

    async def step(self, inputs: Sequence[Array]) -> StepResult:
        """Run one step.

        Raises:
            NotReadyError: nothing was sent.
            GroupError: the group failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's answer: logits float32 ``[L]``, seconds in the queue, seconds its step computed."""

    logits: Array
    queue_s: float
    compute_s: float


@dataclass(slots=True, eq=False)
class QueuedRow:
    """A row in the queue. Times are `time.monotonic` seconds."""

    encoded: Encoded
    future: asyncio.Future[RowResult]
    arrived: float
    deadline: float
    replayed: bool = False

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


class Batcher:
    """The queue of one group.

    Args:
        group: what the steps run on.
        config: the limits.
        pad_id: the token id that fills short rows.
        packs_rows: whether padding costs the group nothing.
        buckets: the shapes that the group takes; none: any.
    """

    def __init__(
        self,
        group: Steps,
        config: BatchConfig,
        pad_id: int,
        packs_rows: bool = False,
        buckets: Sequence[Bucket] = (),
    ) -> None:
        self._group, self._config, self._pad_id = group, config, pad_id
        self._packs_rows, self._buckets = packs_rows, buckets
        self._queue: deque[QueuedRow] = deque()
        self._cut: deque[list[QueuedRow]] = deque()  # steps that were cut and wait for a slot
        self._admitted: set[QueuedRow] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._awake = False  # whether `_start_steps` is to run
        self._closed: GroupError | None = None
        self.rows_not_finite = 0
        group.lifecycle.watch(self._on_group)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a step."""
        return sum(map(len, self._queue)) + sum(len(row) for step in self._cut for row in step)

    def reconfigure(self, config: BatchConfig) -> None:
        """Take other limits. Fewer steps in flight come into force as the running ones end."""
        self._config = config
        self._wake()

    async def submit(self, rows: Sequence[Encoded], deadline: float) -> list[RowResult]:
        """Queue ``rows`` and wait for all their answers, until ``deadline`` (`time.monotonic` seconds).

        Raises:
            OverloadedError: the queue cannot take them all; none was queued.
            DeadlineError: ``deadline`` passed first.
            GroupError: the group failed and could not be brought back in time, or was stopped.
        """
        if self._closed is not None:
            raise self._closed
        if len(self._admitted) + len(rows) > self._config.max_concurrent_requests:
            raise OverloadedError(
                f"{len(self._admitted)} texts are queued or running, and the limit is "
                f"{self._config.max_concurrent_requests}: try again later"
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        queued = [QueuedRow(encoded, loop.create_future(), now, deadline) for encoded in rows]
        self._admitted.update(queued)
        self._queue.extend(queued)
        self._wake()
        futures = [row.future for row in queued]
        try:
            done, waiting = await asyncio.wait(
                futures, timeout=max(0.0, deadline - now), return_when=asyncio.FIRST_EXCEPTION
            )
            for number, future in enumerate(futures):  # the first that failed speaks for all
                if future in done and (error := future.exception()) is not None:
                    raise type(error)(error.message, number) if isinstance(error, ItemError) else error
            if waiting:
                raise DeadlineError("the request's time ran out before it was answered: try again later")
            return [future.result() for future in futures]
        finally:
            self._admitted.difference_update(queued)
            if sum(future.cancel() for future in futures):  # some wait no longer, and are not to be counted
                self._queue = deque(row for row in self._queue if not row.future.done())

    async def close(self, reason: GroupError) -> None:
        """Start no step any more; every row that was admitted, and later ones, raise ``reason``."""
        self._close(reason)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _close(self, reason: GroupError) -> None:
        self._closed = self._closed or reason
        self._queue.clear()
        self._cut.clear()
        for row in self._admitted:
            _fail(row, self._closed)

    def _on_group(self) -> None:
        """The group has another state."""
        if self._group.lifecycle.state is State.STOPPED:
            self._close(self._group.lifecycle.why_not_ready())
        else:
            self._wake()

    def _wake(self) -> None:
        """Start steps soon: what arrives until then goes together."""
        if not self._awake:
            self._awake = True
            asyncio.get_running_loop().call_soon(self._start_steps)

    def _start_steps(self) -> None:
        """Start as many steps as there are slots and rows for, if the group takes any."""
        self._awake = False
        ready = self._closed is None and self._group.lifecycle.state is State.READY
        while ready and len(self._running) < self._config.steps_in_flight and (rows := self._next_step()):
            task = asyncio.get_running_loop().create_task(self._answer(rows))
            self._running.add(task)
            task.add_done_callback(self._on_answered)

    def _on_answered(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake()

    def _next_step(self) -> list[QueuedRow]:
        """The rows of the next step that somebody waits for; [] if there are none."""
        while self._cut or self._queue:
            if not self._cut:
                self._cut.extend(self._cut_steps())
            if rows := [row for row in self._cut.popleft() if _wanted(row)]:
                return rows
        return []

    def _cut_steps(self) -> list[list[QueuedRow]]:
        """Take the oldest rows and cut them into steps."""
        limits = self._config
        if self._packs_rows:
            return [self._take(min(limits.max_step_tokens, limits.max_batch_tokens))]
        rows = self._take(limits.max_batch_tokens)
        if self._buckets:
            return cut_into_buckets(rows, self._buckets) or [[]]
        return cut_steps(rows, limits.max_step_tokens, limits.max_padding) or [[]]

    def _take(self, budget: int) -> list[QueuedRow]:
        """The oldest rows that somebody still waits for, up to ``budget`` tokens and at least one."""
        taken: list[QueuedRow] = []
        while self._queue and (not taken or len(self._queue[0]) <= budget):
            row = self._queue.popleft()
            if _wanted(row):
                taken.append(row)
                budget -= len(row)
        return taken

    async def _answer(self, rows: list[QueuedRow]) -> None:
        started = time.monotonic()
        try:
            result = await self._group.step(pad([row.encoded for row in rows], self._pad_id))
        except GroupError as e:
            self._replay(rows, e, sent=not isinstance(e, NotReadyError))
            return
        except Exception as e:  # noqa: BLE001  # an error of these rows must not keep their callers waiting
            for row in rows:
                _fail(row, e)
            return
        if len(result.logits) != len(rows):
            for row in rows:  # to answer some of them would be to guess whose answer is whose
                _fail(row, GroupError(f"a step of {len(rows)} rows was answered with {len(result.logits)}"))
            return
        finite = np.atleast_1d(np.isfinite(result.logits).all(axis=1))
        for i, row in enumerate(rows):
            if not finite[i]:
                self.rows_not_finite += 1
                log.error("a row of %d tokens has logits that are not finite: %s", len(row), result.logits[i])
                _fail(row, LogitsError(NOT_FINITE))
            elif not row.future.done():
                row.future.set_result(RowResult(result.logits[i], started - row.arrived, result.compute_s))

    def _replay(self, rows: list[QueuedRow], error: GroupError, sent: bool) -> None:
        """Put rows back that were not replayed yet: a row that kills every group it meets must not go on."""
        for row in sorted(rows, key=lambda row: row.arrived, reverse=True):
            if self._closed is not None or (sent and row.replayed):
                _fail(row, self._closed or error)
            elif _wanted(row):
                row.replayed |= sent
                self._queue.appendleft(row)


def _wanted(row: QueuedRow) -> bool:
    return not row.future.done() and time.monotonic() < row.deadline


def _fail(row: QueuedRow, error: Exception) -> None:
    if not row.future.done():
        row.future.set_exception(error)
        row.future.exception()  # marks it seen: its caller may have left
