"""The engine on a real group whose ranks are threads: answers, limits, and a group that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpray.config import BatchConfig, ModelConfig
from tpray.errors import EmptyInputError, InputError, PayloadTooLargeError, RankError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.engine import Engine
from tpray.serving.scores import ACTIVATIONS, Scoring, sigmoid, softmax
from tpray.tokenizer import Item, pad


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


def test_a_request_says_what_is_made_of_the_logits(make_checkpoint: Callable[..., Path]) -> None:
    """The activation, and how many labels; requests of one step may ask for different ones."""

    async def work(engine: Engine) -> None:
        asked = [Scoring(), *(Scoring(how) for how in ACTIVATIONS)]
        answers = await asyncio.gather(*(engine.classify(["a text"], scoring) for scoring in asked))
        row = pad(engine.codec.encode(["a text"]), engine.codec.pad_id)
        logits = (await engine.logits(row))[0].astype(np.float64)
        made = {"softmax": softmax(logits[None])[0], "sigmoid": sigmoid(logits), "none": logits}
        for how, answer in zip(("softmax", *ACTIVATIONS), answers, strict=True):
            in_order = sorted(answer.scores[0], key=lambda score: score.index)
            np.testing.assert_allclose([each.score for each in in_order], made[how], atol=1e-5)
            assert [each.label for each in in_order] == list(engine.codec.record.labels)
        best = (await engine.classify(["a text"], Scoring("none", 2))).scores[0]
        assert [each.score for each in best] == pytest.approx(sorted(logits.tolist(), reverse=True)[:2], abs=1e-5)

    with_engine(make_checkpoint("bert"), work)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"activation": "relu"}, "the activation is 'relu': there are softmax, sigmoid, none"),
        ({"top_k": 0}, "the best 0 are asked for: ask for 1 or more"),
        ({"raw_scores": True, "activation": "softmax"}, "raw_scores are logits, and activation is 'softmax'"),
    ],
)
def test_what_cannot_be_made_of_logits_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Scoring.of(**({"raw_scores": False} | asked))


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
