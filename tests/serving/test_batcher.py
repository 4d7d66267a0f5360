"""The queue: order, bounds, padding, and what becomes of rows whose group dies or whose caller leaves."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

import numpy as np
import pytest

from tpray.config import BatchConfig
from tpray.errors import DeadlineError, GroupError, OverloadedError, RefusedError, StepError
from tpray.group.channel import StepResult
from tpray.group.lifecycle import Lifecycle, State
from tpray.group.wire import Array
from tpray.serving import work_rate
from tpray.serving.batcher import QUICK_STEP_S, Batcher
from tpray.serving.rows import QueuedRow, RowResult, cut_steps
from tpray.serving.work_rate import WorkRate
from tpray.tokenizer import Encoded, pad


def row(length: int, first: int = 9) -> Encoded:
    return Encoded([first] + [5] * (length - 1), [0] * length)


async def echo(inputs: Sequence[Array]) -> StepResult:
    """A step whose logits are the first id of each row."""
    await asyncio.sleep(0.001)
    return StepResult((inputs[0][:, :1].astype(np.float32),), 0.001, 0.001)


Step = Callable[[Sequence[Array]], Awaitable[StepResult]]


class Steps:
    """A group of which nothing but the steps is left."""

    def __init__(self, step: Step) -> None:
        self.lifecycle = Lifecycle()
        self._step = step

    async def step(self, inputs: Sequence[Array]) -> StepResult:
        return await self._step(inputs)

    async def step_in_parts(self, inputs: Sequence[Array]) -> StepResult:
        raise NotImplementedError("it is a group without parts")


class Ranks:
    """A group that computes one thing at a time, a token in 0.1 ms, and long steps in four parts."""

    PARTS, TOKEN_S = 4, 1e-4

    def __init__(self) -> None:
        self.lifecycle = Lifecycle()
        for state in (State.STARTING, State.READY):
            self.lifecycle.move(state)
        self._turn = asyncio.Lock()
        self.did: list[str] = []

    async def _compute(self, inputs: Sequence[Array], share: float, what: str) -> StepResult:
        async with self._turn:
            await asyncio.sleep(float(inputs[1].sum()) * self.TOKEN_S * share)
            self.did.append(what)
        return StepResult((inputs[0][:, :1].astype(np.float32),), 0.001, 0.001)

    async def step(self, inputs: Sequence[Array]) -> StepResult:
        return await self._compute(inputs, 1.0, "step")

    async def step_in_parts(self, inputs: Sequence[Array]) -> StepResult:
        for _ in range(self.PARTS):
            result = await self._compute(inputs, 1 / self.PARTS, "part")
        return result


def test_short_rows_go_between_the_parts_of_a_long_one_and_both_are_answered() -> None:
    async def run() -> None:
        group = Ranks()
        limits = BatchConfig.model_validate({"max_step_tokens": 512, "max_batch_tokens": 512})
        batcher = Batcher(group, limits, 0, packs_rows=True, parts=group.PARTS)
        try:
            for _ in range(2):  # the first step says how fast the ranks are: not so fast that nobody minds to wait
                await batcher.submit([row(512)], 5)
            assert "part" in group.did
            group.did.clear()
            long = asyncio.ensure_future(batcher.submit([row(500, first=7)], 5))
            await asyncio.sleep(0.005)
            for first in range(20, 23):
                (answer,) = await batcher.submit([row(16, first)], 5)
                assert answer.logits[0] == first
                assert not long.done()
            ((answer,), _) = await asyncio.gather(long, batcher.submit([row(16) for _ in range(60)], 5))
            assert answer.logits[0] == 7
            assert group.did[:6] == ["part", "step", "part", "step", "part", "step"]
            assert group.did.count("part") == group.PARTS
        finally:
            await batcher.close(GroupError("closed"))

    asyncio.run(run())


def with_batcher(
    work: Callable[[Batcher], Awaitable[None]],
    step: Step = echo,
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
        results = await batcher.submit([row(1 + i * 7 % 40, first=i) for i in range(100)], 5)
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
        first = asyncio.ensure_future(batcher.submit([row(4)] * 3, 5))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="limit is 4"):
            await batcher.submit([row(4)] * 2, 5)
        assert len(await first) == 3
        assert len(await batcher.submit([row(4)] * 4, 5)) == 4  # the place is free again

    with_batcher(work, max_concurrent_requests=4)


def test_abandoned_rows_cost_no_step() -> None:
    seen: list[int] = []

    async def slow(inputs: Sequence[Array]) -> StepResult:
        seen.extend(inputs[0][:, 0].tolist())
        await asyncio.sleep(0.05)
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        busy = asyncio.ensure_future(batcher.submit([row(4, 1)], 5))
        await asyncio.sleep(0.01)
        left = asyncio.ensure_future(batcher.submit([row(4, 2)], 5))
        late = asyncio.ensure_future(batcher.submit([row(4, 3)], 0.01))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(DeadlineError, match="time ran out"):
            await late
        await busy
        await batcher.submit([row(4, 4)], 5)
        assert seen == [1, 4]

    with_batcher(work, slow, steps_in_flight=1)


Seen = list[list[int]]


def failing(seen: Seen, error: Exception, guilty: Sequence[int] = (66,), others_fail: int = 0) -> Step:
    """Steps that note the first ids of their rows; those with a guilty row, and the first ``others_fail``, raise."""

    async def step(inputs: Sequence[Array]) -> StepResult:
        firsts = inputs[0][:, 0].tolist()
        seen.append(firsts)
        await asyncio.sleep(0.01)
        if set(firsts) & set(guilty) or len(seen) <= others_fail:
            raise error
        return await echo(inputs)

    return step


DIED = GroupError("rank 1 died")
RAISED = StepError("the model raised the same on every rank: ValueError: no")


def test_rows_of_a_dead_group_are_run_again_one_by_one() -> None:
    """With nothing beside them, and in the order they came."""
    seen: Seen = []

    async def work(batcher: Batcher) -> None:
        rows = [asyncio.ensure_future(batcher.submit([row(4, i)], 5)) for i in range(3)]
        while not seen:
            await asyncio.sleep(0)
        later = [asyncio.ensure_future(batcher.submit([row(4, i)], 5)) for i in range(10, 13)]
        answers = await asyncio.gather(*rows, *later)
        assert [result[0].logits[0] for result in answers] == [0, 1, 2, 10, 11, 12]
        assert seen == [[0, 1, 2], [10, 11, 12], [0], [1], [2], [10], [11], [12]]

    with_batcher(work, failing(seen, DIED, others_fail=2))


def test_a_row_that_kills_the_group_takes_only_itself_down_and_is_refused_from_then_on() -> None:
    seen: Seen = []

    async def work(batcher: Batcher) -> None:
        rows = [asyncio.ensure_future(batcher.submit([row(4, first)], 5)) for first in (1, 66, 2)]
        for first, answer in zip((1, 66, 2), await asyncio.gather(*rows, return_exceptions=True), strict=True):
            if first == 66:
                assert isinstance(answer, RefusedError)
                assert "item 0 made this server's ranks fail twice" in str(answer)
            else:
                assert isinstance(answer, list)
                assert answer[0].logits[0] == first
        assert seen == [[1, 66, 2], [1], [66], [66], [2]]
        with pytest.raises(RefusedError, match="item 1 made"):  # sent again; nothing of it is run
            await batcher.submit([row(4, 1), row(4, 66)], 5)
        assert len(seen) == 5
        assert (await batcher.submit([row(5, 66 + 1)], 5))[0].logits[0] == 67

    with_batcher(work, failing(seen, DIED))


def test_a_suspect_is_run_while_nothing_else_is_under_way() -> None:
    """Else it could not be said which of them did it."""
    under_way: list[list[int]] = []
    beside: list[list[int]] = []
    calls = count()

    async def step(inputs: Sequence[Array]) -> StepResult:
        firsts = inputs[0][:, 0].tolist()
        beside.extend([*other, *firsts] for other in under_way)
        under_way.append(firsts)
        call = next(calls)
        await asyncio.sleep(0.03 if call == 1 else 0.005)  # the second one goes on when the first one has died
        under_way.remove(firsts)
        if call == 0:
            raise DIED
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        rows = [asyncio.ensure_future(batcher.submit([row(4, 1), row(4, 2)], 5))]
        while not under_way:
            await asyncio.sleep(0)
        for first in (10, 11, 12):
            rows.append(asyncio.ensure_future(batcher.submit([row(4, first)], 5)))
            await asyncio.sleep(0.002)
        await asyncio.gather(*rows)
        assert beside == [[1, 2, 10]]
        assert next(calls) == 5, "1 and 2 again, each alone; then 11 and 12 together"

    with_batcher(work, step)


def test_a_row_that_was_answered_is_no_suspect_any_more() -> None:
    fails = iter([True, True, False] * 2 + [False] * 9)
    seen: Seen = []

    async def step(inputs: Sequence[Array]) -> StepResult:
        seen.append(inputs[0][:, 0].tolist())
        if next(fails):
            raise DIED
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        for _ in range(2):  # each time two failures, one of them alone
            assert (await batcher.submit([row(4, 5)], 5))[0].logits[0] == 5
        await batcher.submit([row(4, 4), row(4, 5)], 5)
        assert seen == [[5]] * 6 + [[4, 5]]

    with_batcher(work, step)


def test_a_row_that_was_refused_meanwhile_is_not_run_for_another_client_either() -> None:
    seen: Seen = []

    async def work(batcher: Batcher) -> None:
        both = [asyncio.ensure_future(batcher.submit([row(4, 66)], 5)) for _ in range(2)]
        for answer in await asyncio.gather(*both, return_exceptions=True):
            assert isinstance(answer, RefusedError)
        assert seen == [[66, 66], [66], [66]]

    with_batcher(work, failing(seen, DIED))


def test_a_row_whose_client_gave_up_is_still_suspected_when_it_is_sent_again() -> None:
    seen: Seen = []

    async def work(batcher: Batcher) -> None:
        for _ in range(2):
            sent = asyncio.ensure_future(batcher.submit([row(4, 66)], 5))
            while not seen:
                await asyncio.sleep(0)
            sent.cancel()
            await asyncio.sleep(0.03)
        both = [asyncio.ensure_future(batcher.submit([row(4, first)], 5)) for first in (66, 1)]
        answers = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(answers[0], RefusedError)
        assert isinstance(answers[1], list)
        assert all(len(step) == 1 for step in seen), "never beside another"

    with_batcher(work, failing(seen, DIED))


@pytest.mark.parametrize("rows", [1, 2, 13, 64])
def test_a_step_that_raises_is_run_again_in_halves(rows: int) -> None:
    """Neighbours are answered, and finding the guilty row takes two steps for each halving."""
    seen: Seen = []

    async def work(batcher: Batcher) -> None:
        firsts = [*range(100, 100 + rows - 1)]
        firsts.insert(len(firsts) * 2 // 3, 66)
        sent = [asyncio.ensure_future(batcher.submit([row(4, first)], 5)) for first in firsts]
        for first, answer in zip(firsts, await asyncio.gather(*sent, return_exceptions=True), strict=True):
            if first == 66:
                assert isinstance(answer, StepError)
                assert str(answer) == f"item 0 cannot be computed: {RAISED}"
            else:
                assert isinstance(answer, list)
                assert answer[0].logits[0] == first
        assert sorted(seen[0]) == sorted(firsts)
        assert len(seen) <= 1 + 2 * math.ceil(math.log2(rows))

    with_batcher(work, failing(seen, RAISED))


def test_the_item_that_raises_is_numbered_within_its_request() -> None:
    async def work(batcher: Batcher) -> None:
        with pytest.raises(StepError) as caught:
            await batcher.submit([row(4, 1), row(4, 2), row(4, 66), row(4, 3)], 5)
        assert caught.value.item == 2

    with_batcher(work, failing([], RAISED))


def test_packed_rows_go_in_the_order_they_came() -> None:
    """Where padding costs nothing there is no reason to sort; a step is filled up to its tokens."""
    steps: list[list[int]] = []

    async def step(inputs: Sequence[Array]) -> StepResult:
        steps.append(inputs[1].sum(axis=1).tolist())
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        await batcher.submit([row(n) for n in (5, 20, 3, 25, 24, 25, 1, 25, 7)], 5)
        assert steps == [[5, 20, 3, 25, 24], [25, 1, 25, 7]]

    with_batcher(work, step, packs_rows=True, max_step_tokens=100)


@pytest.mark.parametrize("packs_rows", [True, False])
def test_short_rows_do_not_queue_behind_long_ones(packs_rows: bool) -> None:
    """In one queue the last short row would wait for all long ones that came before it."""
    steps: list[list[int]] = []

    async def step(inputs: Sequence[Array]) -> StepResult:
        steps.append(inputs[1].sum(axis=1).tolist())
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        await batcher.submit([row(n) for n in (90, 91, 92, 93, 4, 4, 4, 4, 4, 4, 4)], 5)
        assert steps == [[4] * 7, [90], [91], [92], [93]]

    with_batcher(work, step, packs_rows, max_step_tokens=100)


def test_no_row_is_long_where_steps_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkRate, "tokens_per_s", 100 / (0.9 * QUICK_STEP_S))
    steps: list[list[int]] = []

    async def step(inputs: Sequence[Array]) -> StepResult:
        steps.append(inputs[1].sum(axis=1).tolist())
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        await batcher.submit([row(n) for n in (5, 90, 3, 40, 60, 120, 1)], 5)
        assert steps == [[5, 90, 3], [40, 60], [120], [1]]

    with_batcher(work, step, packs_rows=True, max_step_tokens=100)


def test_rows_that_would_wait_too_long_are_refused_with_the_time_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rate that was measured; before that, nothing is refused for it."""
    monkeypatch.setattr(work_rate, "TRUSTED_S", 0.05)

    async def step(inputs: Sequence[Array]) -> StepResult:
        await asyncio.sleep(0.02)
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        waiting = [asyncio.ensure_future(batcher.submit([row(4)] * 20, 60)) for _ in range(10)]
        await asyncio.sleep(0)
        batcher.check_room(1, 60)
        while batcher.tokens_per_s == 0:
            await asyncio.sleep(0.01)
        rate = batcher.tokens_per_s
        assert 10 < rate < 2 * 8 / 0.02
        wait_s = batcher.queued_tokens / rate
        assert wait_s > 0.5
        with pytest.raises(OverloadedError, match=r"tokens wait, some .* s of work, and the limit is 0\.5 s") as caught:
            batcher.check_room(1, 60)
        assert 1 <= caught.value.retry_after_s <= wait_s + 1
        with pytest.raises(OverloadedError, match=r"limit is 0\.5 s"):
            await batcher.submit([row(4)], 60)
        batcher.reconfigure(BatchConfig(max_queue_s=60, max_step_tokens=8))
        batcher.check_room(1, 60)
        with pytest.raises(OverloadedError, match=r"limit is 0\.1 s"):
            batcher.check_room(1, 0.1)  # it would be answered when nobody waits for it any more
        batcher.reconfigure(BatchConfig(max_queue_s=0, max_step_tokens=8))
        batcher.check_room(1, 0.1)
        for task in waiting:
            task.cancel()

    with_batcher(work, step, max_step_tokens=8, max_queue_s=0.5)


def test_nobody_is_told_to_come_back_after_more_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkRate, "tokens_per_s", 0.01)

    async def work(batcher: Batcher) -> None:
        full = asyncio.ensure_future(batcher.submit([row(4)] * 10, 5))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            batcher.check_room(10, 5)
        assert caught.value.retry_after_s == 60
        full.cancel()

    with_batcher(work, max_concurrent_requests=10)


@pytest.mark.parametrize("packs_rows", [True, False])
def test_the_tokens_that_wait_are_known_at_any_time(packs_rows: bool) -> None:
    """Whatever becomes of rows: answered, given up by their callers, too late, or put back by a step that failed."""
    calls = 0

    async def step(inputs: Sequence[Array]) -> StepResult:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.001)
        if calls % 5 == 0:
            raise GroupError("rank 1 died")
        return await echo(inputs)

    async def work(batcher: Batcher) -> None:
        rng = random.Random(4)
        asked: list[asyncio.Future[list[RowResult]]] = []
        for number in range(200):
            rows = [row(rng.randint(1, 30)) for _ in range(rng.randint(1, 6))]
            timeout_s = rng.choice([0.002, 0.01, 5])
            asked.append(asyncio.ensure_future(batcher.submit(rows, timeout_s)))
            if number % 7 == 0:
                rng.choice(asked).cancel()
            await asyncio.sleep(0.0005 if number % 3 else 0)
            waiting = [*batcher._queue, *(row for step in batcher._cut for row in step)]
            assert batcher.queued_tokens == sum(map(len, waiting))
        await asyncio.gather(*asked, return_exceptions=True)
        while not batcher.idle:
            await asyncio.sleep(0.001)
        assert batcher.queued_tokens == 0

    with_batcher(work, step, packs_rows, max_step_tokens=40, max_batch_tokens=100)
