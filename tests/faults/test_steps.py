"""Faults within a step, on real ranks: what all of them raise, what one raises alone, one that hangs, one that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.faults.processes import ProcessExecutor
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import DeadlineError, RankError, StepError, StepTimeoutError
from tpray.group import pace
from tpray.group.classifier import ClassifierGroup
from tpray.group.executor import Executor
from tpray.group.lifecycle import State
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
from tpray.serving.engine import Engine
from tpray.serving.scores import RAW
from tpray.tokenizer import Encoded
from tpray.trace import ParallelModel, parallel_model_trace


def with_engine(
    executor: Executor, work: Callable[[Engine], Awaitable[None]], source: Path | None = None, **limits: float
) -> None:
    async def run() -> None:
        model = ModelConfig(source=None if source is None else str(source), dtype="float32")
        engine = Engine(ClassifierGroup(model, executor), BatchConfig.model_validate(limits))
        await engine.start()
        try:
            await asyncio.wait_for(work(engine), 120)
        finally:
            await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize(("model_type", "reduces_before"), [("bert", 0), ("xlm-roberta", 1)])
@pytest.mark.parametrize("tp", [2, 3])
def test_a_step_that_all_ranks_leave_at_one_point_leaves_their_collective_in_step(
    model_type: str, reduces_before: int, tp: int, make_checkpoint: Callable[..., Path]
) -> None:
    """A token type that the model lacks, which the engine refuses, put below the engine: each rank's lookup raises.

    Before any collective in BERT; after one in XLM-RoBERTa, whose words are shared out among the ranks.
    """
    executor = ThreadExecutor(tp)

    async def work(engine: Engine) -> None:
        assert engine._batcher is not None
        begun = [worker._collective.begun for worker in executor.workers]
        assert len(set(begun)) == 1
        good = [Encoded([2, 7 + i, 9, 3][: 2 + i % 3], [0] * (2 + i % 3)) for i in range(8)]
        wanted = [result.logits for result in await engine._batcher.submit(good, 10)]
        whole_step = executor.workers[0]._collective.begun - begun[0]
        bad = Encoded([2, 8, 3], [0, 99, 0])
        ids, types = np.array([bad.ids]), np.array([bad.types])
        before = executor.workers[0]._collective.begun
        with pytest.raises(StepError, match="the model raised the same on every rank: IndexError: index out of range"):
            await engine.group.step([ids, ids * 0 + 1, types])
        # The canary comes after it: a whole step. From three ranks on an all-reduce is two exchanges.
        exchanges = reduces_before * (1 if tp == 2 else 2)
        assert executor.workers[0]._collective.begun - before == exchanges + whole_step
        sent = [asyncio.ensure_future(engine._batcher.submit([row], 10)) for row in (*good[:5], bad, *good[5:])]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        assert isinstance(answers.pop(5), StepError)
        for answer, logits in zip(answers, wanted, strict=True):
            assert not isinstance(answer, BaseException)
            np.testing.assert_allclose(answer[0].logits, logits, atol=1e-5)
        again = [result.logits for result in await engine._batcher.submit(good, 10)]
        assert np.array_equal(again, wanted)
        assert engine.restarts == 0

    with_engine(executor, work, make_checkpoint(model_type))


class Lookup(nn.Module):
    """Two all-reduces, and a lookup between them that raises for an index of 9 on ranks from ``short`` on."""

    short = 0

    def __init__(self) -> None:
        super().__init__()
        rank = parallel_state.get_tensor_model_parallel_rank()
        torch.manual_seed(1)
        self.first, self.second = (
            nn.Sequential(
                ColumnParallelLinear(8, 16, gather_output=False), RowParallelLinear(16, 8, input_is_parallel=True)
            )
            for _ in range(2)
        )
        torch.manual_seed(2)
        table = torch.randn(10, 8)
        self.table = nn.Embedding.from_pretrained(table[:9] if rank >= self.short else table)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) + self.table(index))
        return y


class LookupOfOne(Lookup):
    short = 1


def traced(make: Callable[[], nn.Module], executor: Any) -> ParallelModel:
    example = (torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64))
    return parallel_model_trace(make, example, tp_degree=2, executor=executor)


X, GOOD, BAD = torch.ones(3, 8), torch.tensor([1, 2, 8]), torch.tensor([1, 9, 2])


def test_a_users_model_that_raises_between_two_collectives_goes_on_with_right_answers() -> None:
    with traced(Lookup, ThreadExecutor) as model:
        wanted = model(X, GOOD)
        for _ in range(3):
            with pytest.raises(StepError, match="IndexError"):
                model(X, BAD)
            assert torch.equal(model(X, GOOD), wanted)
        assert model._group is not None
        assert model._group.lifecycle.restarts == 0


def test_what_one_rank_raises_alone_fails_the_group_though_the_other_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 is in its second all-reduce, where it would wait for ten minutes."""
    monkeypatch.setattr(pace, "FLOOR_S", 0.5)  # the grace of a step whose time is not known
    with traced(LookupOfOne, ProcessExecutor) as model:
        wanted = model(X, GOOD)
        began = time.monotonic()
        with pytest.raises(RankError, match=r"rank 1 failed in a step: IndexError: .*; rank 0 did not"):
            model(X, BAD)
        assert time.monotonic() - began < 5
        assert torch.equal(model(X, GOOD), wanted)
        assert model._group is not None
        assert model._group.lifecycle.restarts == 1


@pytest.mark.parametrize("hung", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_and_its_requests_are_answered_in_time(hung: int) -> None:
    """Stopped while it computes, so that the other waits for it in a collective."""
    executor = ProcessExecutor(2)

    async def work(engine: Engine) -> None:
        texts = [f"text number {i}" for i in range(64)]
        wanted = (await engine.classify(texts)).scores
        for _ in range(pace.MEASURED):
            await engine.classify(texts)
        for _ in range(50):
            waiting = asyncio.ensure_future(engine.classify(texts, deadline=time.monotonic() + 30))
            await asyncio.sleep(0.003)
            os.kill(executor.pids[hung], signal.SIGSTOP)
            began = time.monotonic()
            await asyncio.sleep(0.2)
            if not waiting.done():
                break
            os.kill(executor.pids[hung], signal.SIGCONT)  # it had answered by then
        hasty = asyncio.ensure_future(engine.classify(["in a hurry"], deadline=time.monotonic() + 2))
        await engine.group.lifecycle.until(State.FAILED)
        noticed_s = time.monotonic() - began
        assert isinstance(engine.group.lifecycle.error, StepTimeoutError)
        assert f"a step was not answered by rank {hung} within" in str(engine.group.lifecycle.error)
        with pytest.raises(DeadlineError):
            await hasty
        answer = await waiting
        print(f"noticed {noticed_s:.1f} s, answered {answer.total_s:.1f} s")
        assert noticed_s < pace.FLOOR_S + 1
        assert [scores[0].label for scores in answer.scores] == [scores[0].label for scores in wanted]
        assert engine.restarts == 1

    with_engine(executor, work, max_client_batch_size=64)


def test_nothing_is_lost_or_wrong_while_ranks_are_killed() -> None:
    """Eight clients, and a rank killed a second after the group came back, twice."""
    executor = ProcessExecutor(2)

    async def work(engine: Engine) -> None:
        texts = [f"number {i} and " + "more " * (i % 17) for i in range(100)]
        wanted = [(await engine.classify([text], RAW)).scores[0] for text in texts]
        running, number, slowest = True, count(), 0.0

        async def client() -> int:
            nonlocal slowest
            answered = 0
            while running:
                i = next(number) % len(texts)
                answer = await engine.classify([texts[i]], RAW)
                for score, right in zip(answer.scores[0], wanted[i], strict=True):
                    assert score.label == right.label
                    assert score.score == pytest.approx(right.score, abs=1e-4)
                slowest = max(slowest, answer.total_s)
                answered += 1
            return answered

        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        for kill in range(2):
            await engine.group.lifecycle.until_ready()
            await asyncio.sleep(1)
            os.kill(executor.pids[kill % 2], signal.SIGKILL)
            await engine.group.lifecycle.until(State.FAILED)
        await engine.group.lifecycle.until_ready()
        running = False
        answered = await asyncio.gather(*clients)
        print(f"{sum(answered)} answered by {engine.restarts + 1} groups, the slowest in {slowest:.1f} s")
        assert min(answered) > 10
        assert engine.restarts == 2

    with_engine(executor, work)
