"""One bounded queue in front of a group, and how steps are formed from it.

When the group can take a step, and not before, the oldest rows up to a token budget leave the queue. A group whose
program packs rows takes them as they came; for any other they are sorted by length and cut into steps whose padding
is bounded. Two steps are in flight, so that the ranks never wait for this process. Rows whose caller left, or whose
time ran out, cost no step. Rows of a step that died with its group go back to the head of the queue, once.

Iteration-level batching of a queue by tokens is TEI's and Orca's (Yu et al., OSDI 2022) idea; an encoder needs
one step a row, so what remains of it is to form a batch only when it can start.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tpray.config import BatchConfig
from tpray.errors import DeadlineError, GroupError, OverloadedError
from tpray.group.life import StepResult
from tpray.group.wire import Array
from tpray.runtime.buckets import Bucket, largest_batch
from tpray.serving.text import Encoded

Step = Callable[[Sequence[Array]], Awaitable[StepResult]]


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's answer: logits float32 ``[L]``, seconds in the queue, seconds its step computed."""

    logits: Array
    queue_s: float
    compute_s: float


@dataclass(slots=True, eq=False)
class Row:
    """A row in the queue. Times are `time.monotonic` seconds."""

    encoded: Encoded
    future: asyncio.Future[RowResult]
    arrived: float
    deadline: float
    replayed: bool = False

    def __len__(self) -> int:
        return len(self.encoded)


def cut_steps(rows: Iterable[Row], max_step_tokens: int, max_padding: float) -> list[list[Row]]:
    """Cut rows into steps: sorted by length, each step within the token limit and the padding limit.

    A row longer than the limit gets a step of its own. The step with the oldest row comes first.
    """
    steps: list[list[Row]] = []
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


def cut_into_buckets(rows: Iterable[Row], buckets: Sequence[Bucket]) -> list[list[Row]]:
    """Cut rows into steps of one bucket each: rows that share the shortest bucket that holds them go together."""
    together: dict[int, list[Row]] = {}
    for row in rows:
        length = min(bucket.length for bucket in buckets if bucket.length >= len(row))
        together.setdefault(length, []).append(row)
    steps = []
    for length, group in together.items():
        size = largest_batch(buckets, length)
        steps += [group[start : start + size] for start in range(0, len(group), size)]
    return sorted(steps, key=lambda step: min(row.arrived for row in step))


def pad(rows: Sequence[Encoded], pad_id: int) -> tuple[Array, Array, Array]:
    """``input_ids``, ``attention_mask``, ``token_type_ids``, int64 ``[B, S]``, S the longest row's length."""
    shape = len(rows), max(len(row) for row in rows)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = 1
        types[i, : len(row)] = row.types
    return ids, mask, types


class Batcher:
    """The queue of one group.

    Args:
        step: runs one step; raises `GroupError` when the group failed.
        ready: set while the group can take steps.
        config: the limits.
        pad_id: the token id that fills short rows.
        packs_rows: whether padding costs the group nothing.
        buckets: the shapes that the group takes; none: any.
    """

    def __init__(
        self,
        step: Step,
        ready: asyncio.Event,
        config: BatchConfig,
        pad_id: int,
        packs_rows: bool = False,
        buckets: Sequence[Bucket] = (),
    ) -> None:
        self._step, self._ready, self._config, self._pad_id = step, ready, config, pad_id
        self._packs_rows, self._buckets = packs_rows, buckets
        self._queue: deque[Row] = deque()
        self._formed: deque[list[Row]] = deque()
        self._admitted = 0
        self._arrival = asyncio.Event()
        self._slots = asyncio.Semaphore(config.steps_in_flight)
        self._surplus = 0  # slots that are taken away when they become free
        self._running: set[asyncio.Task[None]] = set()
        self._pump = asyncio.get_running_loop().create_task(self._run())

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a step."""
        return sum(map(len, self._queue)) + sum(len(row) for step in self._formed for row in step)

    def reconfigure(self, config: BatchConfig) -> None:
        """Take other limits. Fewer steps in flight come into force as the running ones end."""
        more = config.steps_in_flight - self._config.steps_in_flight
        self._config = config
        for _ in range(more):
            self._slots.release()
        self._surplus += max(0, -more)

    async def submit(self, rows: Sequence[Encoded], timeout_s: float) -> list[RowResult]:
        """Queue ``rows`` and wait for all their answers.

        Raises:
            OverloadedError: the queue cannot take them all; none was queued.
            DeadlineError: ``timeout_s`` passed first.
            GroupError: the group failed and could not be brought back in time.
        """
        if self._admitted + len(rows) > self._config.max_concurrent_requests:
            raise OverloadedError(
                f"{self._admitted} texts are queued or running, and the limit is "
                f"{self._config.max_concurrent_requests}: try again later"
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        queued = [Row(encoded, loop.create_future(), now, now + timeout_s) for encoded in rows]
        self._admitted += len(queued)
        self._queue.extend(queued)
        self._arrival.set()
        try:
            return list(await asyncio.wait_for(asyncio.gather(*(row.future for row in queued)), timeout_s))
        except asyncio.TimeoutError as e:
            raise DeadlineError(f"the request was not answered within {timeout_s:g} s") from e
        finally:
            self._admitted -= len(queued)
            for row in queued:
                row.future.cancel()  # no effect on those that are done

    async def close(self, reason: GroupError) -> None:
        """Stop forming steps; rows that wait raise ``reason``."""
        self._pump.cancel()
        for task in self._running:
            task.cancel()
        await asyncio.gather(self._pump, *self._running, return_exceptions=True)
        for row in [*self._queue, *(row for step in self._formed for row in step)]:
            _fail(row, reason)

    async def _run(self) -> None:
        while True:
            await self._slots.acquire()
            rows = await self._next_step()
            await self._ready.wait()
            task = asyncio.get_running_loop().create_task(self._answer(rows))
            self._running.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._surplus:
            self._surplus -= 1
        else:
            self._slots.release()

    async def _next_step(self) -> list[Row]:
        while True:
            while self._formed:
                rows = [row for row in self._formed.popleft() if _wanted(row)]
                if rows:
                    return rows
            if not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            limits = self._config
            if self._packs_rows:
                self._formed.append(self._take(min(limits.max_step_tokens, limits.max_batch_tokens)))
            elif self._buckets:
                self._formed.extend(cut_into_buckets(self._take(limits.max_batch_tokens), self._buckets))
            else:
                rows = self._take(limits.max_batch_tokens)
                self._formed.extend(cut_steps(rows, limits.max_step_tokens, limits.max_padding))

    def _take(self, budget: int) -> list[Row]:
        """The oldest rows that somebody still waits for, up to ``budget`` tokens and at least one."""
        taken: list[Row] = []
        while self._queue and (not taken or len(self._queue[0]) <= budget):
            row = self._queue.popleft()
            if _wanted(row):
                taken.append(row)
                budget -= len(row)
        return taken

    async def _answer(self, rows: list[Row]) -> None:
        started = time.monotonic()
        try:
            result = await self._step(pad([row.encoded for row in rows], self._pad_id))
        except GroupError as e:
            self._replay(rows, e)
            return
        if len(result.logits) != len(rows):
            for row in rows:  # to answer some of them would be to guess whose answer is whose
                _fail(row, GroupError(f"a step of {len(rows)} rows was answered with {len(result.logits)}"))
            return
        for i, row in enumerate(rows):
            if not row.future.done():
                row.future.set_result(RowResult(result.logits[i], started - row.arrived, result.compute_s))

    def _replay(self, rows: list[Row], error: GroupError) -> None:
        """Put rows back that were not replayed yet: a row that kills every group it meets must not go on."""
        for row in sorted(rows, key=lambda row: row.arrived, reverse=True):
            if row.replayed:
                _fail(row, error)
            elif _wanted(row):
                row.replayed = True
                self._queue.appendleft(row)
        self._arrival.set()


def _wanted(row: Row) -> bool:
    return not row.future.done() and time.monotonic() < row.deadline


def _fail(row: Row, error: Exception) -> None:
    if not row.future.done():
        row.future.set_exception(error)
