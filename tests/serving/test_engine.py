"""The engine on a real group whose ranks are threads: answers, limits, and a group that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tpray.config import BatchConfig, ModelConfig
from tpray.errors import EmptyInputError, PayloadTooLargeError, RankError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.engine import Engine
from tpray.tokenizer import Item


def with_engine(directory: Path, work: Callable[[Engine], Awaitable[None]]) -> None:
    async def run() -> None:
        group = ClassifierGroup(ModelConfig(source=str(directory), dtype="float32"), ThreadExecutor(2))
        engine = Engine(group, BatchConfig(max_client_batch_size=8))
        await engine.start()
        try:
            await work(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize("model_type", ["bert", "convbert", "nystromformer", "modernbert", "gpt2"])
def test_scores_do_not_depend_on_what_else_is_in_the_batch(
    model_type: str, make_checkpoint: Callable[..., Path]
) -> None:
    async def work(engine: Engine) -> None:
        items: list[Item] = ["a", "b c d e f g h", ("a b", "c"), "z " * 30]
        together = await engine.classify(items)
        for item, scores in zip(items, together.scores, strict=True):
            alone = (await engine.classify([item])).scores[0]
            for x, y in zip(alone, scores, strict=True):
                assert x.label == y.label
                assert x.score == pytest.approx(y.score, abs=1e-6)
        await engine.check()

    with_engine(make_checkpoint(model_type), work)


def test_limits(make_checkpoint: Callable[..., Path]) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(EmptyInputError):
            await engine.classify([])
        with pytest.raises(PayloadTooLargeError, match="9 items and the limit is 8"):
            await engine.classify(["a"] * 9)

    with_engine(make_checkpoint(), work)


def test_a_failed_group_is_brought_back_and_its_requests_answered(make_checkpoint: Callable[..., Path]) -> None:
    async def work(engine: Engine) -> None:
        before = await engine.classify(["hello"])
        waiting = [asyncio.ensure_future(engine.classify(["hello"])) for _ in range(4)]
        await asyncio.sleep(0)
        engine.group._fail(RankError("rank 1 died"))
        for answer in await asyncio.gather(*waiting):
            assert [s.label for s in answer.scores[0]] == [s.label for s in before.scores[0]]
            assert answer.scores[0][0].score == pytest.approx(before.scores[0][0].score, abs=1e-6)
        assert engine.restarts == 1
        engine.check_alive()

    with_engine(make_checkpoint(), work)
