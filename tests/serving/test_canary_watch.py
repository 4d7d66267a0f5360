"""When a group is asked its canary again, and what becomes of it; its ranks have no model and answer on command."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.serving.conftest import WithEngine
from tests.serving.test_http import client
from tpray.config import BatchConfig
from tpray.errors import GroupError, ParityError
from tpray.group.fake_executor import FakeExecutor, fake_logits
from tpray.group.lifecycle import Lifecycle, State
from tpray.group.wire import Array, Frame, Kind
from tpray.serving import canary_watch
from tpray.serving.canary_watch import CanaryWatch
from tpray.serving.engine import Engine

CANARY = [[3, 1, 4, 1], [5, 9, 0, 0]]
"""The fake group's."""


def is_canary(ids: Array) -> bool:
    return np.array_equal(ids, CANARY)


def asked(executor: FakeExecutor) -> int:
    """How often the ranks were asked the canary."""
    return sum(is_canary(ids) for ids, *_ in executor.steps)


def answers_wrongly(by: float, times: int = 1_000_000) -> Callable[[Frame], Frame]:
    """A rank that is so far off, and is right again after some steps."""
    left = times

    def answer(frame: Frame) -> Frame:
        nonlocal left
        left -= 1
        logits = fake_logits(frame.tensors[0], frame.tensors[1])
        logits[0, 0] += by if left >= 0 else 0
        return Frame(Kind.RESULT, frame.step, (logits,), 1)

    return answer


@pytest.mark.parametrize("by", [0.5, 1e-6, float("nan"), float("inf")])
def test_rows_under_way_are_answered_by_the_group_that_was_built_anew(by: float, with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        right = (await engine.classify(["a b"])).scores
        executor.answer(0, answers_wrongly(by))
        executor.answer(1, lambda frame: Frame(Kind.RESULT, frame.step) if is_canary(frame.tensors[0]) else None)
        async with client(engine) as http:
            waiting = asyncio.ensure_future(engine.classify(["a b"]))
            await asyncio.sleep(0.02)
            found = await http.get("/health?deep")
            assert (found.status_code, found.json()["error_type"]) == (503, "Unhealthy")
            assert "no longer gives the answers of its start" in found.json()["error"]
        assert (await waiting).scores == right
        assert engine.restarts == 1

    with_fake_engine(work)


def test_a_group_that_stays_wrong_is_given_up(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        wrong = answers_wrongly(0.5)
        executor._answer = lambda rank, frame: wrong(frame)  # type: ignore[method-assign]  # also of later ranks
        with pytest.raises(ParityError):
            await engine.check_deeply()
        assert await engine.group.lifecycle.until(State.STOPPED)
        with pytest.raises(GroupError, match="could not be brought back: the sharded float32 logits differ"):
            await engine.check_deeply()

    with_fake_engine(work)


def test_a_difference_that_does_not_come_again_is_only_logged(
    with_fake_engine: WithEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.answer(0, answers_wrongly(1e-6, times=1))
        await engine.check_deeply()
        assert engine.restarts == 0

    with caplog.at_level(logging.WARNING):
        with_fake_engine(work)
    assert "a passing fault" in caplog.text


def test_many_who_ask_share_one_answer(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            answers = await asyncio.gather(*(http.get("/health?deep") for _ in range(50)))
            answers.append(await http.get("/health?deep"))  # within the same second
        assert {answer.status_code for answer in answers} == {200}
        assert asked(executor) == 1

    with_fake_engine(work)


def test_a_group_with_rows_to_answer_is_not_asked_by_itself_but_whoever_asks_is_told(
    with_fake_engine: WithEngine,
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(1)
        waiting = asyncio.ensure_future(engine.classify(["a b"]))
        await asyncio.sleep(0.3)
        assert asked(executor) == 0
        deep = asyncio.ensure_future(engine.check_deeply())
        while asked(executor) < 1:
            await asyncio.sleep(0.01)
        executor.die(1)
        with pytest.raises(GroupError):
            await deep
        assert (await waiting).scores
        executor.steps.clear()
        while asked(executor) < 3:  # now it is idle
            await asyncio.sleep(0.01)

    with_fake_engine(work, canary_interval_s=0.05)


def test_the_interval_can_be_changed_and_0_is_never(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        await asyncio.sleep(0.2)
        assert asked(executor) == 0
        engine.reconfigure(BatchConfig(canary_interval_s=0.01))
        while asked(executor) < 3:
            await asyncio.sleep(0.01)
        engine.reconfigure(BatchConfig(canary_interval_s=0))
        await asyncio.sleep(0.02)
        executor.steps.clear()
        await asyncio.sleep(0.2)
        assert asked(executor) == 0

    with_fake_engine(work, canary_interval_s=0)


def test_a_costly_canary_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the time that it takes is bounded, whatever the interval."""

    class Costly:
        canary_steps = 2

        def __init__(self) -> None:
            self.lifecycle = Lifecycle()
            self.lifecycle.move(State.STARTING)
            self.lifecycle.move(State.READY)
            self.asked = 0

        async def check_again(self, number: int) -> None:
            self.asked += 1
            await asyncio.sleep(0.02)

    async def main() -> None:
        group = Costly()
        watch = CanaryWatch(group, lambda: True)
        began = time.monotonic()
        watch.start(0.001)
        await asyncio.sleep(1)
        watch.stop()
        busy_s = group.asked * 0.02
        assert 0.04 <= busy_s <= 0.25 * (time.monotonic() - began)

    monkeypatch.setattr(canary_watch, "SHARE", 0.1)
    asyncio.run(main())
