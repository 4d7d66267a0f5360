"""What becomes of requests when their group fails, restarts, is given up or closed; its ranks fail on command."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.serving.conftest import WithEngine
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import (
    ConfigError,
    DeadlineError,
    GroupError,
    LogitsError,
    OverloadedError,
    PlacementError,
    RankError,
    RefusedError,
    StepError,
)
from tpray.group import pace
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor, fake_logits
from tpray.group.lifecycle import State
from tpray.group.wire import Array, Frame, Kind
from tpray.serving.engine import Engine
from tpray.serving.local import LocalClassifier


async def restarting(engine: Engine, executor: FakeExecutor) -> asyncio.Event:
    """Have a rank die, and the restart wait for the event that is returned."""
    hold = executor.block("connect")
    executor.die(1)
    await engine.group.lifecycle.until(State.STARTING)
    return hold


def test_rows_under_way_are_run_again_once_their_group_is_back(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        wanted = (await engine.classify(["a b"])).scores
        executor.hang(0)
        waiting = [asyncio.ensure_future(engine.classify(["a b"])) for _ in range(4)]
        await asyncio.sleep(0.02)
        executor.die(1)
        for answer in await asyncio.gather(*waiting):
            assert answer.scores == wanted
        assert engine.restarts == 1
        engine.check_alive()

    with_fake_engine(work)


def test_rows_that_come_during_a_restart_wait_in_the_queue_and_are_counted(with_fake_engine: WithEngine) -> None:
    """The autoscaler goes by the tokens that wait: those of a group that restarts are among them."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        hold = await restarting(engine, executor)
        waiting = [asyncio.ensure_future(engine.classify(["a b"])) for _ in range(5)]
        await asyncio.sleep(0.02)
        tokens = len(engine.codec.encode(["a b"])[0])
        assert engine.queued_tokens == 5 * tokens
        with pytest.raises(GroupError, match="is restarting: rank 1 died"):
            await engine.check()
        engine.check_alive()
        hold.set()
        for answer in await asyncio.gather(*waiting):
            assert answer.tokens == tokens
        assert engine.queued_tokens == 0
        await engine.check()

    with_fake_engine(work)


def test_when_a_group_is_given_up_its_callers_are_told_at_once(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        hold = await restarting(engine, executor)
        executor.fail("spawn", PlacementError("no room"), times=3)
        executor.fail("connect", RankError("and again"))
        waiting = [asyncio.ensure_future(engine.classify(["a b"], deadline=time.monotonic() + 60)) for _ in range(4)]
        await asyncio.sleep(0.02)
        hold.set()
        began = time.monotonic()
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, GroupError)
            assert not isinstance(answer, DeadlineError)
            assert "could not be brought back: no room" in str(answer)
        assert time.monotonic() - began < 2
        for check in (engine.classify(["a"]), engine.check()):
            with pytest.raises(GroupError, match="could not be brought back"):
                await check
        with pytest.raises(GroupError, match="could not be brought back"):
            engine.check_alive()

    with_fake_engine(work)


def test_rows_whose_time_ran_out_during_a_restart_are_not_computed(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        hold = await restarting(engine, executor)
        late = asyncio.ensure_future(engine.classify(["too late"], deadline=time.monotonic() + 0.02))
        patient = asyncio.ensure_future(engine.classify(["in time"]))
        with pytest.raises(DeadlineError, match="time ran out"):
            await late
        executor.steps.clear()
        hold.set()
        await patient
        sent = [row.tolist() for ids, *_ in executor.steps for row in ids]
        assert engine.codec.encode(["in time"])[0].ids in sent
        assert engine.codec.encode(["too late"])[0].ids not in sent

    with_fake_engine(work)


def holding(engine: Engine, text: str) -> Callable[[Array], bool]:
    """Whether a step's token ids hold the first word of ``text``."""
    word = engine.codec.encode([text])[0].ids[1]
    return lambda ids: bool((ids == word).any())


def test_a_row_that_kills_every_group_it_meets_does_not_go_on(with_fake_engine: WithEngine) -> None:
    """Others are answered. It is refused once the group has died of it alone, twice, and when it comes again."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.die_of(holding(engine, "poison"))
        others = [asyncio.ensure_future(engine.classify([text])) for text in ("a", "b", "c d")]
        with pytest.raises(RefusedError, match="item 0 made this server's ranks fail twice, and is not run again"):
            await engine.classify(["poison"])
        for other in others:
            assert (await other).scores
        assert engine.restarts == 3
        with pytest.raises(RefusedError, match="item 1 made"):
            await engine.classify(["fine", "poison"])
        assert (await engine.classify(["fine"])).scores
        assert engine.restarts == 3

    with_fake_engine(work)


def test_a_row_that_all_ranks_raise_at_gets_its_error_and_nothing_restarts(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.raise_on(holding(engine, "bad"), "ValueError: bad row")
        others = [asyncio.ensure_future(engine.classify([text])) for text in ("a", "b", "c d")]
        with pytest.raises(StepError) as caught:
            await engine.classify(["fine", "bad"])
        said = "cannot be computed: the model raised the same on every rank: ValueError: bad row"
        assert str(caught.value) == f"item 1 {said}"
        for other in others:
            assert (await other).scores
        ids = np.array([engine.codec.encode(["bad"])[0].ids])
        with pytest.raises(StepError, match=r"^the model raised the same on every rank: ValueError: bad row$"):
            await engine.logits([ids, ids * 0 + 1, ids * 0])
        assert engine.restarts == 0
        assert executor.calls.count("spawn") == 1

    with_fake_engine(work)


def test_ranks_that_raise_alike_whatever_they_are_given_are_a_failure(with_fake_engine: WithEngine) -> None:
    """A machine can fail on all ranks alike, too: so the group runs its canary after such a step."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        for rank in range(2):
            executor.answer(rank, lambda frame: Frame(Kind.ERROR, frame.step, text="RuntimeError: the device is lost"))
        assert (await engine.classify(["a b"])).scores
        assert engine.restarts == 1

    with_fake_engine(work)


def test_wrong_numbers_after_an_error_are_a_failure(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.raise_on(holding(engine, "bad"), "ValueError: bad row")
        right = executor._answer

        def wrong(frame: Frame) -> Frame | None:
            answered = right(0, frame)
            if answered is None or answered.kind is Kind.ERROR:
                return answered
            return replace(answered, tensors=(answered.tensors[0] + 1,))

        executor.answer(0, wrong)
        with pytest.raises(StepError):  # found with the canary, and again with whole ranks
            await engine.classify(["bad"])
        assert engine.restarts == 1

    with_fake_engine(work)


def test_steps_of_several_buckets_have_their_error_too(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.raise_on(holding(engine, "bad"), "ValueError: bad row")
        with pytest.raises(StepError) as caught:
            await engine.classify(["a", "b", "c", "bad", "d"])
        assert caught.value.item == 3
        rows = [engine.codec.encode([text])[0].ids for text in ("a", "b", "bad")]
        ids = np.array([row[:3] for row in rows])
        with pytest.raises(StepError):  # in the second bucket of one call
            await engine.logits([ids, ids * 0 + 1, ids * 0])
        assert (await engine.classify(["a", "b", "c"])).scores
        assert engine.restarts == 0

    with_fake_engine(work, buckets=((2, 8), (2, 128)))


def test_a_hang_is_found_long_before_its_requests_expire(
    with_fake_engine: WithEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits as they are by default; only the floor is lower, for the test to be short."""
    monkeypatch.setattr(pace, "FLOOR_S", 0.3)

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        for _ in range(pace.MEASURED):
            await engine.classify(["a b"])
        executor.hang(1)
        answer = await engine.classify(["a b"])
        assert 0.3 <= answer.total_s < 3
        assert engine.restarts == 1

    with_fake_engine(work, step_timeout_s=60)


def test_a_deadline_comes_at_its_time_also_while_rows_are_run_again(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(1)
        began = time.monotonic()
        waiting = asyncio.ensure_future(engine.classify(["a b"], deadline=time.monotonic() + 0.3))
        await asyncio.sleep(0.05)
        executor.die(1)
        await engine.group.lifecycle.until(State.FAILED)
        await engine.group.lifecycle.until_ready()
        executor.hang(1)
        with pytest.raises(DeadlineError, match="time ran out"):
            await waiting
        assert 0.29 < time.monotonic() - began < 0.5

    with_fake_engine(work)


def test_close_tells_every_caller_and_later_ones_at_once(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(0)
        waiting = [asyncio.ensure_future(engine.classify(["a b"])) for _ in range(40)]
        await asyncio.sleep(0.02)
        began = time.monotonic()
        await engine.stop()
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, GroupError)
        with pytest.raises(GroupError):
            await engine.classify(["a b"])
        assert time.monotonic() - began < 2

    with_fake_engine(work)


def test_a_step_of_another_number_of_rows_is_an_error_of_its_rows(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.answer(0, lambda f: Frame(Kind.RESULT, f.step, (np.zeros((7, 2), dtype=np.float32),), 1))
        with pytest.raises(GroupError, match="a step of 1 rows was answered with 7"):
            await engine.classify(["a"])
        assert engine.group.lifecycle.state is State.READY

    with_fake_engine(work)


def test_a_hanging_rank_is_found_by_the_steps_limit_and_the_request_answered(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(1)
        assert (await engine.classify(["a b"])).scores
        assert engine.restarts == 1

    with_fake_engine(work, step_timeout_s=0.7)


def test_logits_wait_for_a_restart_and_are_computed_again(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        ids = np.array([[2, 8, 9, 3]])
        inputs = [ids, ids * 0 + 1, ids * 0]
        hold = await restarting(engine, executor)
        with pytest.raises(DeadlineError):
            await engine.logits(inputs, timeout_s=0.02)
        waiting = asyncio.ensure_future(engine.logits(inputs))
        hold.set()
        assert np.array_equal(await waiting, fake_logits(ids, inputs[1]))
        executor.hang(0)
        waiting = asyncio.ensure_future(engine.logits(inputs))
        await asyncio.sleep(0.02)
        executor.die(1)
        assert np.array_equal(await waiting, fake_logits(ids, inputs[1]))

    with_fake_engine(work)


def test_other_limits_hold_from_then_on(with_fake_engine: WithEngine) -> None:
    """Steps in flight follow, up and down."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(1)  # so that no step ends
        for slots in (1, 4, 2):
            engine.reconfigure(BatchConfig(steps_in_flight=slots, max_step_tokens=4))
            waiting = [asyncio.ensure_future(engine.classify(["a"])) for _ in range(4)]
            wanted = max(slots, 4 if slots == 2 else 0)
            while len(executor.steps) < wanted:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert len(executor.steps) == wanted, "and no more"
            for task in waiting:
                task.cancel()

    with_fake_engine(work, max_step_tokens=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_their_rows_error(value: float, with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        bad = engine.codec.encode(["bad"])[0].ids[1]

        def answer(frame: Frame) -> Frame:
            logits = fake_logits(frame.tensors[0], frame.tensors[1])
            logits[(frame.tensors[0] == bad).any(axis=1), 0] = value
            return Frame(Kind.RESULT, frame.step, (logits,), 1)

        executor.answer(0, answer)
        good = asyncio.ensure_future(engine.classify(["fine"]))
        with pytest.raises(LogitsError, match="item 1 gets logits that are not finite") as caught:
            await engine.classify(["fine", "bad"])
        assert caught.value.item == 1
        assert (await good).scores
        assert engine.load.rows_not_finite == 1
        ids = np.array([[5, 6], [bad, 6]])
        with pytest.raises(LogitsError, match="item 1"):
            await engine.logits([ids, ids * 0 + 1, ids * 0])
        assert engine.restarts == 0

    with_fake_engine(work)


def local(executor: FakeExecutor) -> LocalClassifier:
    return LocalClassifier(ClassifierGroup(ModelConfig(dtype="float32"), executor), BatchConfig())


def test_closing_a_classifier_while_another_thread_classifies_leaves_nobody_waiting() -> None:
    executor = FakeExecutor(2)
    classifier = local(executor)
    executor.hang(0)
    started = threading.Barrier(4)

    def classify() -> object:
        started.wait(10)
        return classifier.classify(["a b"] * 100)

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(classify) for _ in range(3)]
        started.wait(10)
        time.sleep(0.1)
        classifier.close()
        for future in waiting:
            with pytest.raises((GroupError, ConfigError)):
                future.result(timeout=5)
    with pytest.raises(ConfigError, match="was closed"):
        classifier.classify("a")
    with pytest.raises(ConfigError, match="was closed"):
        classifier.logits(input_ids=[[1, 2]])
    classifier.close()


def test_rows_that_nobody_waits_for_are_not_counted(with_fake_engine: WithEngine) -> None:
    """The queue of a group that restarts stays bounded, and the autoscaler is not misled."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        hold = await restarting(engine, executor)
        for _ in range(5):
            late = [
                asyncio.ensure_future(engine.classify(["a b"], deadline=time.monotonic() + 0.005)) for _ in range(10)
            ]
            for answer in await asyncio.gather(*late, return_exceptions=True):
                assert isinstance(answer, DeadlineError)
        assert engine.queued_tokens == 0
        hold.set()
        assert (await engine.classify(["a b"])).scores

    with_fake_engine(work, max_concurrent_requests=10)


def test_closing_from_several_threads_waits_for_one_end() -> None:
    executor = FakeExecutor(2)
    classifier = local(executor)
    hold = executor.block("kill")

    with ThreadPoolExecutor(5) as pool:
        closing = [pool.submit(classifier.close) for _ in range(4)]
        time.sleep(0.1)
        assert not any(future.done() for future in closing)
        classifier._loop.loop.call_soon_threadsafe(hold.set)
        for future in closing:
            future.result(timeout=5)
    assert executor.calls[-2:] == ["kill", "release"]


def test_what_is_refused_was_not_tokenised(with_fake_engine: WithEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under overload most requests are refused: they must cost little."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(0)
        waiting = [asyncio.ensure_future(engine.classify(["a b"])) for _ in range(3)]
        await asyncio.sleep(0.02)
        encoded: list[object] = []
        monkeypatch.setattr(engine.codec, "encode", lambda *arguments: encoded.append(arguments))
        with pytest.raises(OverloadedError, match="3 texts are queued or running"):
            await engine.classify(["a b"])
        assert not encoded
        for task in waiting:
            task.cancel()

    with_fake_engine(work, max_concurrent_requests=3)
