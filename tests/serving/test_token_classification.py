"""Entities: what transformers' token-classification pipeline gives for each text by itself, in mixed batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console

from tests.serving.conftest import WithEngine
from tests.text_kinds import WORDS
from tpray.commands.classify_file import classify_file
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import InputError, InputTooLongError, UnsupportedTaskError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.engine import Engine
from tpray.serving.entities import OF_WORDS, STRATEGIES
from tpray.serving.http import make_app
from tpray.serving.local import LocalClassifier
from tpray.serving.tagging import Tagging, tag

LABELS = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]))
TEXTS = [
    "The firm is in Paris, and not in London.",
    "Ça n'est pas vrai — “naïve” É 42 你好",
    "  two  spaces\tand\nlines ",
    "x",
    " ".join([*WORDS, *reversed(WORDS)][:30]),
]
Make = Callable[..., Path]


def token_model(make_checkpoint: Make, model_type: str) -> Path:
    return make_checkpoint(
        model_type, architectures=["ForTokenClassification"], id2label=LABELS, num_labels=6, max_position_embeddings=160
    )


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [{k: v for k, v in each.items() if k != "score"} for each in found] == [
        {k: v for k, v in each.items() if k != "score"} for each in expected
    ]
    np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "esm"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_are_the_pipelines(model_type: str, make_checkpoint: Make) -> None:
    """Of every strategy, with WordPiece, byte-level BPE, unigram, and a tokenizer in Python; over HTTP and alone."""
    from transformers import pipeline

    directory = token_model(make_checkpoint, model_type)
    stock = pipeline("token-classification", model=str(directory), device="cpu")
    special = stock.tokenizer.sep_token or stock.tokenizer.eos_token
    texts = [*TEXTS, f"the firm {special} in Paris"] if model_type != "esm" else ["MKTAY IAKQR", "GLSDG", "L"]
    seen: set[tuple[str, bool]] = set()
    strategies = [s for s in STRATEGIES if model_type != "esm" or s not in OF_WORDS]

    async def run() -> None:
        engine = Engine(
            ClassifierGroup(ModelConfig(source=str(directory), dtype="float32"), ThreadExecutor(2)), BatchConfig()
        )
        await engine.start()
        try:
            transport = httpx.ASGITransport(make_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
                assert (await http.get("/info")).json()["task"] == "token-classification"
                for strategy in strategies:
                    for ignored in (["O"], []):
                        body = {"aggregation_strategy": strategy, "ignore_labels": ignored}
                        answer = await http.post("/token_classification", json={"inputs": texts, "parameters": body})
                        together = answer.json()
                        for text, found in zip(texts, together, strict=True):
                            expected = stock(text, aggregation_strategy=strategy, ignore_labels=ignored)
                            same(found, expected)
                            seen.update((strategy, " " in entity["word"]) for entity in found)
                            alone = await tag(engine, [text], Tagging(strategy, ignored))
                            same(alone.entities[0], expected)
            assert model_type == "esm" or all((strategy, True) in seen for strategy in strategies[1:]), (
                "nothing grouped"
            )
            if model_type == "esm":
                with pytest.raises(UnsupportedTaskError, match="does not say where words are"):
                    await tag(engine, texts, Tagging("first"))
        finally:
            await engine.stop()

    asyncio.run(run())


@pytest.fixture(scope="module")
def labeller(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalClassifier]:
    """With programs of fixed shapes."""
    shapes = ((1, 24), (2, 16), (2, 48))
    model = ModelConfig(source=str(token_model(make_checkpoint, "bert")), dtype="float32", buckets=shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPRAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        with LocalClassifier(ClassifierGroup(model, ThreadExecutor(2)), BatchConfig()) as started:
            yield started


def test_static_shapes_and_logits(labeller: LocalClassifier) -> None:
    """Rows come back from whichever bucket they were in; a process reward model's logits can be had for each token."""
    text = "the firm is here"
    alone = labeller.classify_tokens(text, ignore_labels=(), raw_scores=True)
    together = labeller.classify_tokens(
        [text, "a train", text + " and " + text, "x"], ignore_labels=(), raw_scores=True
    )
    assert [each["word"] for each in alone] == [each["word"] for each in together[0]]
    np.testing.assert_allclose([e["logits"] for e in alone], [e["logits"] for e in together[0]], atol=1e-5)
    for each in alone:
        assert text[each["start"] : each["end"]] == each["word"].removeprefix("##")
        assert LABELS[int(np.argmax(each["logits"]))] == each["entity"]
    ids = np.array([[2, *([5] * 17), 3], [2, *([6] * 17), 3], [2, *([7] * 17), 3]])
    assert labeller.logits(input_ids=ids).shape == (3, 19, 6)  # of two rows in a bucket of 48, and one in one of 24


def test_what_cannot_be_labelled_is_refused(labeller: LocalClassifier) -> None:
    long = "the firm " * 30
    with pytest.raises(InputTooLongError, match="set `truncate` to true"):
        labeller.classify_tokens(long)
    cut = labeller.classify_tokens(long, ignore_labels=(), truncate=True)
    assert len(cut) == 46
    assert all(long[each["start"] : each["end"]] == each["word"].removeprefix("##") for each in cut)
    for wrong, match in (
        ([("a", "b")], "item 0 is no text: tokens are labelled in single texts"),
        (["a", ""], "item 1 is empty"),
    ):
        with pytest.raises(InputError, match=match):
            labeller.classify_tokens(wrong)  # type: ignore[arg-type]  # what is wrong
    strategy: Any = "sum"
    with pytest.raises(InputError, match="aggregation_strategy is 'sum': there are none, simple, first, average, max"):
        labeller.classify_tokens("a", strategy)
    with pytest.raises(InputError, match="raw_scores are each token's"):
        labeller.classify_tokens("a", "simple", raw_scores=True)
    assert labeller.classify_tokens([]) == []


def test_a_model_does_its_own_task(labeller: LocalClassifier, with_fake_engine: WithEngine) -> None:
    with pytest.raises(UnsupportedTaskError, match="labels the tokens of texts: ask for /token_classification"):
        labeller.classify("a text")
    with pytest.raises(UnsupportedTaskError, match="labels the tokens"):
        labeller.rerank("a", ["b"])

    async def work(engine: Engine, _: object) -> None:
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            answer = await http.post("/token_classification", json={"inputs": "a text"})
            assert answer.status_code == 424
            assert "labels texts and not their tokens: ask for /predict" in answer.json()["error"]
            answer = await http.post("/token_classification", json={"inputs": "a", "parameters": {"stride": 3}})
            assert (answer.status_code, "`parameters.stride` is not known here" in answer.json()["error"]) == (
                422,
                True,
            )

    with_fake_engine(work)


def test_each_line_of_a_file_gets_its_entities(labeller: LocalClassifier, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"text": "the firm is in Paris"}\n{"text": "a", "text_pair": "b"}\n{"text": "x", "entities": 1}\n'
    )
    counts = classify_file(labeller, str(source), str(target), Console(stderr=True))
    first, pair, last = (json.loads(line) for line in target.read_text().splitlines())
    assert first["entities"] == labeller.classify_tokens("the firm is in Paris", "simple")
    assert pair["error"] == "line 2 is no text: tokens are labelled in single texts"
    assert last["entities"] == 1
    assert isinstance(last["tpray_entities"], list)
    assert (counts.classified, counts.refused) == (2, [2])
