"""The life of a group, with ranks that fail on command: no model, no Ray, milliseconds each."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.group.conftest import IDS, INPUTS, MASK, PlainGroup, WithGroup
from tpray.errors import (
    CompileError,
    ConfigError,
    GroupError,
    NotReadyError,
    PlacementError,
    RankError,
    StartTimeoutError,
    StepError,
    StepTimeoutError,
)
from tpray.group.fake_executor import Answer, FakeExecutor, fake_logits
from tpray.group.lifecycle import State
from tpray.group.pace import GRACE_S, MEASURED
from tpray.group.phases import PHASES, PhaseReport
from tpray.group.supervisor import RESTARTS_WITHOUT_A_STEP
from tpray.group.wire import Array, Frame, Kind
from tpray.parallel_layers.counters import LINE


def test_the_fake_needs_no_torch() -> None:
    code = "import sys, tpray.group.fake_executor, tpray.group.group; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_start_has_phases_in_their_order_and_a_step_is_answered(with_group: WithGroup) -> None:
    seen: list[PhaseReport] = []

    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        assert group.lifecycle.state is State.READY
        assert [p.name for p in seen] == ["resolve", "place", "spawn", "pin", "connect", "check"]
        assert [p.number for p in seen] == [1, 2, 3, 4, 5, 8]
        assert seen == group.phases
        assert executor.calls == ["place", "spawn", "pin", "connect"]
        assert np.array_equal((await group.step(INPUTS)).logits, fake_logits(IDS, MASK))
        assert [worker.rank for worker in group.workers] == [0, 1, 2]

    with_group(work, tp=3, progress=seen.append)


def test_steps_are_answered_in_any_number_and_each_by_its_own(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.delay(1, 0.002)
        ids = [np.full((1, 2), i) for i in range(20)]
        results = await asyncio.gather(*(group.step([x, x * 0 + 1, x * 0]) for x in ids))
        for x, result in zip(ids, results, strict=True):
            assert np.array_equal(result.logits, fake_logits(x, x * 0 + 1))

    with_group(work)


def error_answer(frame: Frame) -> Frame:
    return Frame(Kind.ERROR, frame.step, text="ValueError: no")


def other_error_answer(frame: Frame) -> Frame:
    return Frame(Kind.ERROR, frame.step, text="ValueError: yes")


def raised_after(exchanges: int) -> Answer:
    return lambda frame: Frame(Kind.ERROR, frame.step, (np.array(exchanges),), text="ValueError: no")


def collective_failed(frame: Frame) -> Frame:
    return Frame(Kind.FAULT, frame.step, (np.array(3),), text="CollectiveError: a peer is gone")


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        (lambda executor: executor.die(1), RankError, "rank 1 died"),
        (lambda executor: executor.hang(1), StepTimeoutError, r"not answered by rank 1 within \d+\.\d s"),
        (lambda executor: executor.delay(0, 1.5), StepTimeoutError, "not answered by rank 0"),
        (
            lambda executor: executor.answer(1, error_answer),
            RankError,
            "rank 1 failed in a step: ValueError: no; rank 0 did not",
        ),
        (
            lambda executor: (executor.answer(1, error_answer), executor.hang(0)),
            RankError,
            "rank 1 failed in a step: ValueError: no; rank 0 did not",
        ),
        (
            lambda executor: (executor.answer(1, error_answer), executor.answer(0, other_error_answer)),
            RankError,
            "rank 0 failed in a step: ValueError: yes; rank 1: ValueError: no",
        ),
        (
            lambda executor: (executor.answer(0, raised_after(3)), executor.answer(1, raised_after(4))),
            RankError,
            "rank 0 failed in a step: ValueError: no; rank 1: ValueError: no",
        ),
        (
            lambda executor: (executor.answer(0, collective_failed), executor.answer(1, raised_after(4))),
            RankError,
            "rank 1 failed in a step: ValueError: no; rank 0: CollectiveError: a peer is gone",
        ),
        (
            lambda executor: (executor.answer(0, collective_failed), executor.answer(1, collective_failed)),
            RankError,
            "rank 0 failed in a step: CollectiveError: a peer is gone; rank 1: CollectiveError",
        ),
        (
            lambda executor: (executor.answer(0, collective_failed), executor.hang(1)),
            StepTimeoutError,
            "not answered by rank 1 within",
        ),
        (lambda executor: executor.answer(0, lambda f: Frame(Kind.RESULT, f.step)), RankError, "without an output"),
    ],
    ids=[
        "dead",
        "hanging",
        "late",
        "raising while another answers",
        "raising while another waits",
        "raising otherwise",
        "raising the same elsewhere",
        "raising, and its peer's collective fails",
        "both in a collective",
        "hanging, and its peer's collective fails",
        "silent about its output",
    ],
)
def test_one_bad_rank_fails_the_group_which_comes_back(
    command: Any, error: type[GroupError], words: str, with_group: WithGroup
) -> None:
    """In the same place, with all ranks new; what was under way raises, and what comes later is answered."""

    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        command(executor)
        with pytest.raises(error, match=words):
            await group.step(INPUTS)
        assert group.lifecycle.state in (State.FAILED, State.STARTING)
        with pytest.raises(NotReadyError, match="is restarting"):
            await group.step(INPUTS)
        await group.lifecycle.until_ready()
        assert group.lifecycle.restarts == 1
        again = ["kill", "place", "spawn", "pin", "connect"]
        assert executor.calls == [*again[1:], *again]
        assert "release" not in executor.calls
        assert np.array_equal((await group.step(INPUTS)).logits, fake_logits(IDS, MASK))

    with_group(work, step_timeout_s=0.7)


def is_bad(ids: Array) -> bool:
    return bool((ids == 66).any())


BAD = [np.array([[66, 1]]), np.ones((1, 2), dtype=np.int64), np.zeros((1, 2), dtype=np.int64)]


def test_what_all_ranks_raise_alike_is_the_steps_own_error_and_nothing_restarts(with_group: WithGroup) -> None:
    """Also with steps before and behind it; and where ranks name sizes and addresses of their own."""

    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        for rank in range(3):
            text = f"RuntimeError: cannot allocate {1000 + rank} bytes at 0x7f{rank}a\nwith a traceback"
            executor.raise_on(is_bad, text, [rank])
        steps = (INPUTS, BAD, INPUTS, BAD, INPUTS)
        results = await asyncio.gather(*map(group.step, steps), return_exceptions=True)
        for inputs, result in zip(steps, results, strict=True):
            if inputs is BAD:
                assert isinstance(result, StepError)
                assert not isinstance(result, GroupError)
                said = "the model raised the same on every rank: RuntimeError: cannot allocate 1000 bytes at 0x7f0a"
                assert str(result) == said
            else:
                assert not isinstance(result, BaseException)
                assert np.array_equal(result.logits, fake_logits(IDS, MASK))
        assert group.lifecycle.state is State.READY
        assert group.lifecycle.restarts == 0
        assert executor.calls.count("spawn") == 1

    with_group(work, tp=3)


def test_ranks_that_raise_one_after_another_raise_alike(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.raise_on(is_bad, "ValueError: no")
        executor.delay(1, 0.1)
        with pytest.raises(StepError, match="ValueError: no"):
            await group.step(BAD)
        assert group.lifecycle.state is State.READY

    with_group(work)


def test_a_rank_that_raises_alone_fails_the_group_long_before_the_steps_limit(with_group: WithGroup) -> None:
    """The others wait for it in a collective, and would for as long as that takes."""

    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        for _ in range(MEASURED):
            await group.step(INPUTS)
        executor.answer(1, error_answer)
        executor.hang(0)
        began = time.monotonic()
        with pytest.raises(RankError, match="rank 1 failed in a step: ValueError: no; rank 0 did not"):
            await group.step(INPUTS)
        assert GRACE_S <= time.monotonic() - began < GRACE_S + 1

    with_group(work, step_timeout_s=60)


def test_a_rank_that_raises_what_another_did_not_fails_the_group_at_once(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.answer(1, error_answer)
        executor.hang(2)
        began = time.monotonic()
        with pytest.raises(RankError, match="rank 1 failed in a step: ValueError: no; rank 0, 2 did not"):
            await group.step(INPUTS)
        assert time.monotonic() - began < 1

    with_group(work, tp=3)


def test_the_limit_of_a_step_counts_from_when_those_before_it_were_answered(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.delay(1, 0.2)
        results = await asyncio.gather(*(group.step(INPUTS) for _ in range(5)))  # the last one takes a second
        assert all(0.15 < result.total_s < 0.3 for result in results)

    with_group(work, step_timeout_s=0.7)


def test_the_rank_that_is_behind_is_named_and_not_those_that_wait_for_it(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        assert group.channel._memory is not None
        for rank, count in ((0, 8), (1, 7), (2, 8)):
            os.pwrite(group.channel._memory, struct.pack("q", count), rank * LINE)
            executor.hang(rank)
        os.ftruncate(group.channel._memory, 3 * LINE)
        with pytest.raises(StepTimeoutError) as caught:
            await group.step(INPUTS)
        assert str(caught.value) == (
            "a step was not answered by rank 1 within 0.2 s; rank 0, 2 waits for it in a collective"
        )
        await group.lifecycle.until_ready()
        for rank in range(3):  # whose collective counts nothing
            executor.hang(rank)
        with pytest.raises(StepTimeoutError, match=r"not answered by rank 0, 1, 2 within 0\.2 s$"):
            await group.step(INPUTS)

    with_group(work, tp=3, step_timeout_s=0.2)


def test_a_group_that_fails_at_every_step_is_given_up(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.die_of(is_bad)
        for _ in range(RESTARTS_WITHOUT_A_STEP - 1):
            with pytest.raises(RankError):
                await group.step(BAD)
            await group.lifecycle.until_ready()
        await group.step(INPUTS)  # it can answer: counted anew
        for _ in range(RESTARTS_WITHOUT_A_STEP):
            with pytest.raises(RankError):
                await group.step(BAD)
            await group.lifecycle.until_ready()
        with pytest.raises(RankError):
            await group.step(BAD)
        await group.lifecycle.until(State.STOPPED)
        with pytest.raises(GroupError, match="came back 8 times and answered nothing: rank 1 died"):
            await group.step(INPUTS)

    with_group(work)


def test_no_step_is_taken_while_the_group_restarts_and_none_disturbs_it(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        loaded = executor.block("connect")
        sent = len(executor.steps)
        executor.die(0)
        await group.lifecycle.until(State.STARTING)
        for _ in range(3):
            with pytest.raises(NotReadyError, match="is restarting: rank 0 died"):
                await group.step(INPUTS)
            await asyncio.sleep(0.01)
        assert len(executor.steps) == sent
        loaded.set()
        await group.lifecycle.until_ready()
        assert group.lifecycle.restarts == 1

    with_group(work)


def test_a_group_that_does_not_come_back_is_given_up(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.fail("spawn", PlacementError("no room"), times=3)
        executor.die(1)
        await group.lifecycle.until(State.STOPPED)
        with pytest.raises(GroupError, match="could not be brought back: no room"):
            await group.lifecycle.until_ready()
        with pytest.raises(GroupError, match="could not be brought back: no room"):
            await group.step(INPUTS)
        while executor.calls[-1] != "release":
            await asyncio.sleep(0.001)
        assert executor.calls.count("spawn") == 4

    with_group(work)


def test_failures_are_counted_in_a_row(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        for restarts in (1, 2):
            executor.fail("spawn", PlacementError("no room"), times=2)
            executor.die(1)
            await group.lifecycle.until(State.FAILED)
            await group.lifecycle.until_ready()
            assert group.lifecycle.restarts == restarts

    with_group(work)


def test_a_rank_that_dies_while_the_group_starts_ends_the_start_at_once() -> None:
    """Though the phase that is going on asks nothing of that rank."""

    class Slow(PlainGroup):
        async def _check(self) -> None:
            self.reached = True
            await asyncio.sleep(60)

        reached = False

    async def main() -> None:
        executor = FakeExecutor(2)
        group = Slow(executor)
        starting = asyncio.ensure_future(group.start())
        while not group.reached:
            await asyncio.sleep(0.001)
        executor.die(1)
        with pytest.raises(RankError, match="rank 1 died"):
            await asyncio.wait_for(starting, 2)
        assert group.lifecycle.state is State.STOPPED
        assert executor.calls[-2:] == ["kill", "release"]

    asyncio.run(main())


@pytest.mark.parametrize("call", ["place", "spawn", "pin", "connect"])
def test_a_start_that_fails_leaves_nothing(call: str) -> None:
    async def main() -> None:
        executor = FakeExecutor(2)
        executor.fail(call, CompileError("the compiler's words"))
        group = PlainGroup(executor)
        with pytest.raises(CompileError, match="the compiler's words"):
            await group.start()
        assert executor.calls[-2:] == ["kill", "release"]
        with pytest.raises(GroupError, match="the start failed: the compiler's words"):
            await group.step(INPUTS)

    asyncio.run(main())


def test_a_phase_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setitem(PHASES, "spawn", 0.05)
        executor = FakeExecutor(2)
        executor.block("spawn")
        with pytest.raises(StartTimeoutError, match=r"phase 3 \(spawn\) did not finish within 0 s"):
            await PlainGroup(executor).start()
        assert executor.calls[-2:] == ["kill", "release"]

    asyncio.run(main())


def test_ranks_report_within_a_phase(with_group: WithGroup) -> None:
    seen: list[PhaseReport] = []

    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.die(0)
        await group.lifecycle.until(State.FAILED)
        hold = asyncio.Event()

        async def check() -> None:
            executor.report(1, "the program for [1, 16]")
            await hold.wait()

        group._check = check  # type: ignore[method-assign]  # this one group alone checks for so long
        while not any(not report.done for report in seen):
            await asyncio.sleep(0.001)
        hold.set()
        await group.lifecycle.until_ready()
        (report,) = [report for report in seen if not report.done]
        assert (report.name, report.note) == ("check", "1 done; rank 1: the program for [1, 16]")

    with_group(work, progress=seen.append)


def test_stop_gives_the_place_back_even_if_a_rank_cannot_be_ended() -> None:
    async def main() -> None:
        executor = FakeExecutor(2)
        group = PlainGroup(executor)
        await group.start()
        executor.fail("kill", GroupError("process 7 is still there"))
        with pytest.raises(GroupError, match="still there"):
            await group.stop()
        assert executor.calls[-2:] == ["kill", "release"]
        with pytest.raises(GroupError, match="still there"):  # whoever asks is told
            await group.stop()
        assert executor.calls[-2:] == ["kill", "release"]

    asyncio.run(main())


def test_stop_fails_what_is_under_way_and_ends_a_restart(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.hang(1)
        step = asyncio.ensure_future(group.step(INPUTS))
        await asyncio.sleep(0.01)
        executor.die(0)
        with pytest.raises(RankError, match="rank 0 died"):
            await step
        executor.block("spawn")
        while executor.calls.count("spawn") < 2:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(group.stop(), 1)
        with pytest.raises(GroupError, match="was stopped"):
            await group.step(INPUTS)

    with_group(work)


def test_a_caller_that_leaves_disturbs_nobody(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor.delay(0, 0.02)
        left, stays = (asyncio.ensure_future(group.step(INPUTS)) for _ in range(2))
        await asyncio.sleep(0.005)
        left.cancel()
        assert np.array_equal((await stays).logits, fake_logits(IDS, MASK))
        assert np.array_equal((await group.step(INPUTS)).logits, fake_logits(IDS, MASK))
        assert group.lifecycle.state is State.READY

    with_group(work)


def test_a_foreign_frame_fails_the_group(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        executor._ranks[0].sock.sendall(b"HTTP/1.1 200 OK" + b" " * 64)
        await group.lifecycle.until(State.FAILED)
        assert "unknown header" in str(group.lifecycle.error)
        await group.lifecycle.until_ready()

    with_group(work)


def test_a_stop_that_its_caller_leaves_ends_the_ranks_all_the_same(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        hold = executor.block("kill")
        leaving = asyncio.ensure_future(group.stop())
        await asyncio.sleep(0.01)
        leaving.cancel()
        hold.set()
        await group.stop()
        assert executor.calls[-2:] == ["kill", "release"]

    with_group(work)


def test_no_phase_comes_after_a_stop() -> None:
    async def main() -> None:
        executor = FakeExecutor(2)
        group = PlainGroup(executor)
        hold = executor.block("place")
        starting = asyncio.ensure_future(group.start())
        while "place" not in executor.calls:
            await asyncio.sleep(0)
        hold.set()
        stopping = asyncio.ensure_future(group.stop())
        with pytest.raises(GroupError, match="was stopped"):
            await starting
        await stopping
        assert "spawn" not in executor.calls

    asyncio.run(main())


def test_a_restart_that_is_cancelled_from_within_counts_as_failed(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        restart, calls = group.restart, 0

        async def cancelled() -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                group.lifecycle.move(State.STARTING)
                group.lifecycle.move(State.FAILED, RankError("again"))
                raise asyncio.CancelledError
            await restart()

        group.restart = cancelled  # type: ignore[method-assign]  # as if Ray cancelled what it awaits
        executor.die(0)
        await group.lifecycle.until(State.FAILED)
        await group.lifecycle.until_ready()
        assert calls == 2

    with_group(work)


def test_a_dtype_that_the_wire_does_not_carry_is_refused_and_the_group_goes_on(with_group: WithGroup) -> None:
    async def work(group: PlainGroup, executor: FakeExecutor) -> None:
        with pytest.raises(ConfigError, match="complex64 cannot go to or from a rank: convert it to one of int64"):
            await group.step([np.zeros(2, dtype=np.complex64)])
        assert np.array_equal((await group.step(INPUTS)).logits, fake_logits(IDS, MASK))

    with_group(work, step_timeout_s=0.5)
