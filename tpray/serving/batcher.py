"""One bounded queue in front of a group, and how steps are formed from it.

When the group can take a step, and not before, the oldest rows up to a token budget leave the queue; long rows and
short ones take turns (`row_queue`). A group whose program packs rows takes them as they came; for any other they are
sorted by length and cut into steps whose padding is bounded. Two steps are in flight, so that the ranks never wait for
this process. Rows whose caller left, or whose time ran out, cost no step.

A step in which all ranks raise alike is run again in halves, so that its neighbours are answered and the row at fault
gets its error: O(log n) further steps. When the group fails, any of the rows under way may be what did it. They go back
to their place in the queue and are run again while their deadlines last, each by itself with nothing else under way.
The one at fault takes only itself down, and is soon refused (`suspects`). While the group restarts all rows wait.

Iteration-level batching of a queue by tokens is TEI's and Orca's (Yu et al., OSDI 2022) idea; an encoder needs
one step a row, so what remains of it is to form a batch only when it can start.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np

from tpray.config import BatchConfig
from tpray.errors import (
    DeadlineError,
    GroupError,
    LogitsError,
    NotReadyError,
    OverloadedError,
    RefusedError,
    StepError,
)
from tpray.group.channel import StepResult
from tpray.group.lifecycle import Lifecycle, State
from tpray.group.wire import Array
from tpray.runtime.buckets import Bucket, size_in
from tpray.serving.load import Load
from tpray.serving.request_notes import of_no_request, of_row, step_notes
from tpray.serving.row_queue import SHORT_SHARE, Lane, RowQueue
from tpray.serving.rows import QueuedRow, RowResult, StepAnswer, cut_into_buckets, cut_steps, results_of, tokens_in
from tpray.serving.suspects import EXPIRY_S, Suspects
from tpray.serving.waiting import Waiting
from tpray.serving.work_rate import WorkRate
from tpray.tokenizer import Encoded, pad

log = logging.getLogger(__name__)

NOT_FINITE = (
    "gets logits that are not finite (NaN or infinite) from this model: its weights are damaged, or --dtype is too "
    "narrow for them; try --dtype float32"
)

REFUSED = (
    f"made this server's ranks fail twice, and is not run again for {EXPIRY_S / 60:g} minutes: leave it out, and tell "
    "whoever runs the server, whose log says how they failed"
)

LONG_SHARE = 0.25
"""A row that fills more than this of a step is long: on CPU cores a step of so many tokens wastes little by itself."""

QUICK_STEP_S = 0.05
"""Where a full step takes less, nobody minds to wait for a long row."""

RETRY_LIMIT_S = 60
"""Nobody is told to come back later than this: a rate that was measured now says little of then."""


class Steps(Protocol):
    """What a batcher needs of a group."""

    lifecycle: Lifecycle

    async def step(self, inputs: Sequence[Array]) -> StepResult:
        """Run one step.

        Raises:
            NotReadyError: nothing was sent.
            StepError: every rank raised the same; the group goes on.
            GroupError: the group failed.
        """
        ...

    async def step_in_parts(self, inputs: Sequence[Array]) -> StepResult:
        """The same, with other steps between its parts."""
        ...


class Batcher:
    """The queue of one group.

    Args:
        group: what the steps run on.
        config: the limits.
        pad_id: the token id that fills short rows.
        packs_rows: whether padding costs the group nothing.
        buckets: the shapes that the group takes; none: any.
        parts: into how many pieces it can cut a step of long rows, so that short ones need not wait for all of it.
        load: takes note of what is done.
    """

    def __init__(
        self,
        group: Steps,
        config: BatchConfig,
        pad_id: int,
        packs_rows: bool = False,
        buckets: Sequence[Bucket] = (),
        parts: int = 1,
        load: Load | None = None,
    ) -> None:
        self._group, self._config, self._pad_id = group, config, pad_id
        self._packs_rows, self._buckets, self._parts = packs_rows, buckets, parts
        self._cut: deque[list[QueuedRow]] = deque()  # steps that were cut and wait for a slot
        self._cut_tokens = 0  # in those
        self._admitted: set[QueuedRow] = set()
        self._running: dict[asyncio.Task[None], int] = {}  # its tokens, if there are long rows among them; else 0
        self._alone = False  # whether what runs is a suspect
        self._suspects = Suspects()
        self._awake = False  # whether `_start_steps` is to run
        self._closed: GroupError | None = None
        self._rate = WorkRate()
        self._queue: RowQueue[QueuedRow] = RowQueue(_wanted, self._long_tokens)
        self._waiting = Waiting()
        self._load = load or Load()
        group.lifecycle.watch(self._on_group)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a step."""
        return self._queue.tokens + self._cut_tokens

    def waiting(self) -> tuple[int, float]:
        """How many rows wait for a step, and since when the oldest of them, seconds; it looks at all."""
        rows = [row for row in chain(self._queue, *self._cut) if _wanted(row)]
        return len(rows), time.monotonic() - min((row.arrived for row in rows), default=math.inf) if rows else 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self._admitted or self._running)

    @property
    def _long_tokens(self) -> float:
        """Rows of more tokens are long; where shapes are fixed, or steps are quick, none is."""
        limit, step_s = self._config.max_step_tokens, self._rate.seconds_for(self._config.max_step_tokens)
        return math.inf if self._buckets or 0 < step_s < QUICK_STEP_S else limit * LONG_SHARE

    @property
    def tokens_per_s(self) -> float:
        """How fast the queue empties when there is one; 0: that is not known."""
        return self._rate.tokens_per_s

    def check_room(self, rows: int, timeout_s: float) -> None:
        """Refuse more rows than may wait, and rows that would wait too long; costs little, so ask before any work.

        How long a row would wait follows from the tokens before it and the measured rate; while that is not known,
        nothing is refused for it. ``timeout_s`` is how long the caller waits: what comes later is of no use.

        Raises:
            OverloadedError: with the time in which there should be room.
        """
        if timeout_s <= 0:
            raise DeadlineError("the request's time ran out before it was queued")
        limits, queued = self._config, self.queued_tokens
        wait_s = self._rate.seconds_for(queued)
        excess = len(self._admitted) + rows - limits.max_concurrent_requests
        if excess > 0:
            room_s = wait_s * excess / max(1, len(self._admitted))
            raise OverloadedError(
                f"{len(self._admitted)} texts are queued or running, and the limit is "
                f"{limits.max_concurrent_requests}: try again later",
                _whole_seconds(room_s),
            )
        limit_s = min(limits.max_queue_s, timeout_s)
        if limits.max_queue_s and wait_s > limit_s:
            raise OverloadedError(
                f"{queued} tokens wait, some {wait_s:.1f} s of work, and the limit is {limit_s:g} s: try again later",
                _whole_seconds(wait_s - limit_s),
            )

    def reconfigure(self, config: BatchConfig) -> None:
        """Take other limits. Fewer steps in flight come into force as the running ones end."""
        self._config = config
        self._queue.long_tokens = self._long_tokens
        self._wake()

    async def submit(self, rows: Sequence[Encoded], timeout_s: float) -> list[RowResult]:
        """Queue ``rows`` and wait for all their answers.

        Raises:
            OverloadedError: the queue cannot take them all, see `check_room`; none was queued.
            DeadlineError: ``timeout_s`` passed first.
            LogitsError, StepError, RefusedError: a row's own error.
            GroupError: the group was given up, or was stopped.
        """
        if self._closed is not None:
            raise self._closed
        for number, encoded in enumerate(rows):
            if self._suspects.refuses(encoded):
                raise RefusedError(REFUSED, number)
        self.check_room(len(rows), timeout_s)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        queued = [QueuedRow(row, loop.create_future(), now, now + timeout_s, row in self._suspects) for row in rows]
        self._admitted.update(queued)
        self._queue.extend(queued)
        self._wake()
        futures = [row.future for row in queued]
        late = DeadlineError("the request's time ran out before it was answered")
        try:
            with self._waiting.until(now + timeout_s, late):
                return await results_of(futures)
        finally:
            self._admitted.difference_update(queued)
            for future in futures:
                future.cancel()
            if any(future.cancelled() for future in futures):  # these wait no longer, and are not to be counted
                self._queue.keep(lambda row: not row.future.done())

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
        self._cut_tokens = 0
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
            asyncio.get_running_loop().call_soon(self._start_steps, context=of_no_request())

    def _start_steps(self) -> None:
        """Start as many steps as there are slots and rows for, if the group takes any."""
        self._awake = False
        ready = self._closed is None and self._group.lifecycle.state is State.READY
        slots = self._config.steps_in_flight
        while ready and not self._alone and len(self._running) < slots and (rows := self._next_step()):
            if not self._running:
                self._rate.begin()
            self._alone = rows[0].suspected
            tokens, full = tokens_in(rows), bool(self._cut or self._queue)
            long = any(map(self._queue.is_long, rows))
            task = asyncio.get_running_loop().create_task(self._answer(rows, long and self._parts > 1))
            self._running[task] = tokens if long else 0
            task.add_done_callback(partial(self._on_answered, tokens, full))

    def _on_answered(self, tokens: int, full: bool, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._alone = False  # if it was, this was it
        if self._group.lifecycle.state is State.READY:  # else the step has failed, and says nothing of the rate
            self._rate.add(tokens, full)
            self._queue.long_tokens = self._long_tokens
        self._wake()

    def _next_step(self) -> list[QueuedRow]:
        """The rows of the next step that somebody waits for; [] if there are none that can start now."""
        while self._cut or self._cut_steps():
            step = self._cut.popleft()
            self._cut_tokens -= tokens_in(step)
            if rows := [row for row in step if _wanted(row)]:
                return rows
        return []

    def _cut_steps(self) -> bool:
        """Take the rows whose turn it is and cut them into steps; whether there are any."""
        long_under_way = max(self._running.values(), default=0)
        lane = self._queue.turn(bool(self._running), long_under_way > 0)
        if lane is None:
            return False
        limits = self._config
        one_step = self._packs_rows or lane is Lane.LONG
        budget = min(limits.max_step_tokens, limits.max_batch_tokens) if one_step else limits.max_batch_tokens
        if lane is Lane.SHORT and long_under_way and self._parts > 1:  # between two of its parts
            budget = min(budget, SHORT_SHARE * long_under_way // self._parts)
        rows = self._queue.take(lane, budget)
        if self._packs_rows or lane is Lane.SUSPECT:
            self._cut.append(rows)
        elif self._buckets:
            self._cut.extend(cut_into_buckets(rows, self._buckets))
        else:
            self._cut.extend(cut_steps(rows, limits.max_step_tokens, limits.max_padding))
        self._cut_tokens += tokens_in(rows)
        return True

    async def _answer(self, rows: list[QueuedRow], in_parts: bool) -> None:
        if rows[0].suspected and self._suspects.refuses(rows[0].encoded):  # since it came
            _fail(rows[0], RefusedError(REFUSED))
            return
        started = time.monotonic()
        try:
            inputs = pad([row.encoded for row in rows], self._pad_id)
            with step_notes(rows) as notes:
                result = await (self._group.step_in_parts(inputs) if in_parts else self._group.step(inputs))
                notes.answered(result)
        except NotReadyError:  # nothing was sent
            self._put_back(rows)
            return
        except GroupError as e:
            self._suspect(rows, e)
            return
        except StepError as e:
            self._halve(rows, e)
            return
        except Exception as e:  # noqa: BLE001  # an error of these rows must not keep their callers waiting
            for row in rows:
                _fail(row, e)
            return
        self._note(rows, int(inputs[0].shape[1]), result)
        if len(result.logits) != len(rows):
            for row in rows:  # to answer some of them would be to guess whose answer is whose
                _fail(row, GroupError(f"a step of {len(rows)} rows was answered with {len(result.logits)}"))
            return
        finite = np.isfinite(result.logits)
        wrong = [] if finite.all() else np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1)).tolist()
        answer = StepAnswer(np.nan_to_num(result.logits) if wrong else result.logits, result.compute_s)
        for i, row in enumerate(rows):
            if i in wrong:
                self._load.rows_not_finite += 1
                log.error("a row of %d tokens has logits %s", len(row), result.logits[i], extra=of_row(row))
                _fail(row, LogitsError(NOT_FINITE))
            elif not row.future.done():
                row.future.set_result(RowResult(answer, i, started - row.arrived))
            if row.suspected:
                self._suspects.clear(row.encoded)

    def _note(self, rows: list[QueuedRow], length: int, result: StepResult) -> None:
        """A step of ``rows``, the longest of which has ``length`` tokens, was answered."""
        tokens, most = tokens_in(rows), self._config.max_step_tokens
        computed = tokens if self._packs_rows else len(rows) * length
        if self._buckets:
            computed, most = size_in(self._buckets, len(rows), length)
        self._load.add(len(rows), tokens, result.compute_s, result.total_s, computed - tokens, tokens / most)

    def _halve(self, rows: list[QueuedRow], error: StepError) -> None:
        """Run the two halves of a step that raised, before anything else; a row by itself has its error."""
        if len(rows) > 1:
            self._load.steps_halved += 1
            self._cut.extendleft([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
            self._cut_tokens += tokens_in(rows)
            return
        log.error("a row of %d tokens: %s", len(rows[0]), error, extra=of_row(rows[0]))
        _fail(rows[0], StepError(f"cannot be computed: {error.message}"))
        self._suspects.clear(rows[0].encoded)

    def _suspect(self, rows: list[QueuedRow], error: GroupError) -> None:
        """The group failed during the step of ``rows``: remember them, and put them back."""
        for row in rows:
            self._suspects.add(row.encoded, alone=row.suspected)
            row.suspected = True
        if self._suspects.refuses(rows[0].encoded):
            self._load.poison_rows += 1
            log.error("a row of %d tokens is refused from now on: %s", len(rows[0]), error, extra=of_row(rows[0]))
            _fail(rows[0], RefusedError(REFUSED))
        self._load.replays += self._put_back(rows)

    def _put_back(self, rows: list[QueuedRow]) -> int:
        """Queue rows again, where they were, and say how many; or tell them, if the group is given up."""
        if self._closed is not None:
            for row in rows:
                _fail(row, self._closed)
        self._queue.put_back(wanted := [row for row in rows if _wanted(row)])
        return len(wanted)


def _whole_seconds(seconds: float) -> int:
    """Rounded up, at least 1 and at most `RETRY_LIMIT_S`."""
    return max(1, min(RETRY_LIMIT_S, math.ceil(seconds)))


def _wanted(row: QueuedRow) -> bool:
    return not row.future.done() and time.monotonic() < row.deadline


def _fail(row: QueuedRow, error: Exception) -> None:
    if not row.future.done():
        row.future.set_exception(error)
        row.future.exception()  # marks it seen: its caller may have left
