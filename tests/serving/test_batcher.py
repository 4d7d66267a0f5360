"""The queue: order, bounds, padding, and what becomes of rows whose group dies or whose caller leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from tpray.config import BatchConfig
from tpray.errors import DeadlineError, GroupError, OverloadedError
from tpray.group.channel import StepResult
from tpray.group.lifecycle import Lifecycle, State
from tpray.group.wire import Array
from tpray.serving.batcher import Batcher, QueuedRow, cut_steps
from tpray.tokenizer import Encoded, pad


def row(length: int, first: int = 9) -> Encoded:
    return Encoded([first] + [5] * (length - 1), [0] * length)


async def echo(inputs: Sequence[Array]) -> StepResult:
    """A step whose logits are the first id of each row."""
    await asyncio.sleep(0.001)
    return StepResult((inputs[0][:, :1].astype(np.float32),), 0.001, 0.001)


class Steps:
    """A group of which nothing but the steps is left."""

    def __init__(self, step: Callable[[Sequence[Array]], Awaitable[StepResult]]) -> None:
        self.lifecycle = Lifecycle()
        self._step = step

    async def step(self, inputs: Sequence[Array]) -> StepResult:
        return await self._step(inputs)


def with_batcher(
    work: Callable[[Batcher], Awaitable[None]],
    step: Callable[[Sequence[Array]], Awaitable[StepResult]] = echo,
    packs_rows: bool = False,
    **limits: float,
) -> None:
    async def run() -> None:
        group = Steps(step)
        group.lifecycle.move(State.STARTING)
        group.lifecycle.move(State.READY)
        batcher = Batcher(group, BatchConfig.model_validate(limits), 0, packs_rows)
        try:
            await asyncio.wait_for(work(batcher), 10)
        finally:
            await batcher.close(GroupError("closed"))

    asyncio.run(run())


def test_every_row_gets_its_own_answer_in_order() -> None:
    async def work(batcher: Batcher) -> None:
        results = await batcher.submit([row(1 + i * 7 % 40, first=i) for i in range(100)], time.monotonic() + 5)
        assert [r.logits[0] for r in results] == list(range(100))

    with_batcher(work, max_step_tokens=64)


def test_steps_bound_tokens_and_padding() -> None:
    loop = asyncio.new_event_loop()
    rows = [QueuedRow(row(n), loop.create_future(), float(i), 1e9) for i, n in enumerate([5, 50, 6, 49, 7, 200, 5])]
    steps = cut_steps(rows, max_step_tokens=110, max_padding=0.2)
    loop.close()
    assert sorted(len(r) for step in steps for r in step) == [5, 5, 6, 7, 49, 50, 200]
    assert rows[0] in steps[0]  # the oldest goes first
    for step in steps:
        padded = len(step) * max(map(len, step))
        assert padded <= 110 or len(step) == 1
        assert sum(map(len, step)) >= 0.8 * padded


def test_padding_is_masked() -> None:
    ids, mask, types = pad([Encoded([3, 4], [0, 1]), Encoded([5], [0])], pad_id=7)
    assert ids.tolist() == [[3, 4], [5, 7]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert types.tolist() == [[0, 1], [0, 0]]


def test_a_full_queue_refuses_all_of_a_request() -> None:
    async def work(batcher: Batcher) -> None:
        first = asyncio.ensure_future(batcher.submit([row(4)] * 3, time.monotonic() + 5))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="limit is 4"):
            await batcher.submit([row(4)] * 2, time.monotonic() + 5)
        assert len(await first) == 3
        assert len(await batcher.submit([row(4)] * 4, time.monotonic() + 5)) == 4  # the place is free again

    with_batcher(work, max_concurrent_requests=4)


def test_abandoned_rows_cost_no_step() -> None:
    seen: list[int] = []

    async def slow(inputs: Sequence[Array]) -> StepResult:
        seen.extend(inputs[0][:, 0].tolist())
        await asyncio.sleep(0.05)
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        busy = asyncio.ensure_future(batcher.submit([row(4, 1)], time.monotonic() + 5))
        await asyncio.sleep(0.01)
        left = asyncio.ensure_future(batcher.submit([row(4, 2)], time.monotonic() + 5))
        late = asyncio.ensure_future(batcher.submit([row(4, 3)], time.monotonic() + 0.01))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(DeadlineError, match="time ran out"):
            await late
        await busy
        await batcher.submit([row(4, 4)], time.monotonic() + 5)
        assert seen == [1, 4]

    with_batcher(work, slow, steps_in_flight=1)


def test_rows_of_a_dead_group_are_replayed_once() -> None:
    calls = 0

    async def dies(inputs: Sequence[Array]) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 1 or inputs[0][0, 0] == 66:
            raise GroupError("rank 1 died")
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        assert (await batcher.submit([row(4, 8)], time.monotonic() + 5))[0].logits[0] == 8
        with pytest.raises(GroupError, match="rank 1 died"):
            await batcher.submit([row(4, 66)], time.monotonic() + 5)  # a row that kills every group it meets
        assert calls == 4

    with_batcher(work, dies)


def test_packed_rows_go_in_the_order_they_came() -> None:
    """Where padding costs nothing there is no reason to sort; a step is filled up to its tokens."""
    steps: list[list[int]] = []

    async def step(inputs: Sequence[Array]) -> StepResult:
        steps.append(inputs[1].sum(axis=1).tolist())
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        await batcher.submit([row(n) for n in (5, 90, 3, 40, 60, 120, 1)], time.monotonic() + 5)
        assert steps == [[5, 90, 3], [40, 60], [120], [1]]

    with_batcher(work, step, packs_rows=True, max_step_tokens=100)
