"""Texts in chunks: the rows of transformers' tokenizers, their scores aggregated, limits, the doors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.conftest import WithEngine
from tests.serving.test_rerank import MOST, QUERY, cross_encoder, documents, record, reranker, with_engine
from tpray.errors import (
    EmptyInputError,
    InputError,
    InputTooLongError,
    PayloadTooLargeError,
    StepError,
    UnsupportedTaskError,
)
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.chunked_items import encode_chunks
from tpray.serving.chunks import Chunks
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.engine import Engine
from tpray.serving.http import make_app
from tpray.serving.scores import OWN, RAW
from tpray.tokenizer import Encoded, as_item

LONG = " ".join(documents(40))
"""Of some thousand words."""


def stock_chunks(tokenizer: Any, first: str | None, text: str, stride: int, side: str) -> list[Encoded]:
    """What transformers makes of ``text`` with ``return_overflowing_tokens``; one in Python does so chunk by chunk."""
    settings = {
        "truncation": "only_first" if first is None else "only_second", "max_length": MOST, "stride": stride,
        "return_overflowing_tokens": True, "verbose": False,
    }  # fmt: skip
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        if tokenizer.is_fast:
            made = tokenizer(*([text] if first is None else [first, text]), **settings)
            parts = [{name: values[n] for name, values in made.items()} for n in range(len(made["input_ids"]))]
        else:
            own, left = (
                None if each is None else tokenizer.encode(each, add_special_tokens=False, verbose=False)
                for each in (first, text)
            )
            parts = []
            while left:
                parts.append(tokenizer.prepare_for_model(*([left] if own is None else [own, left]), **settings))
                left = parts[-1].get("overflowing_tokens")
    finally:
        tokenizer.truncation_side = before
    return [Encoded(p["input_ids"], p.get("token_type_ids", [0] * len(p["input_ids"]))) for p in parts]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "t5", "qwen3", "esm", "flaubert"])
@pytest.mark.parametrize("side", ["Left", "Right"])
def test_chunks_are_the_rows_of_transformers(
    side: Direction, model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of compiled tokenizers and those in Python; of short texts, and of long ones, which are read in parts."""
    directory = reranker(make_checkpoint(model_type), tmp_path / "m")
    codec = TextCodec(directory, record(("a",), model_type))
    assert codec.compiled == (model_type not in ("esm", "flaubert"))
    for text in ("the firm", LONG[:300], LONG):
        for first in (None, "the firm is"):
            for stride in (0, 1, 5):
                item = text if first is None else (first, text)
                (made,) = encode_chunks(codec, [item], Chunks(stride=stride, max_chunks=256), True, side)
                expected = stock_chunks(codec._stock, first, text, stride, side.lower())
                assert made == expected[:256]
            (first_chunks,) = encode_chunks(codec, [item], Chunks(stride=5, max_chunks=3), True, side)
            assert first_chunks == expected[:3], "the others are cut"


def test_what_chunks_do_not_hold_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    codec = TextCodec(reranker(make_checkpoint("bert"), tmp_path / "m"), record(("a",)))
    chat = as_item([{"role": "user", "content": "a"}])
    for item, options, error, words in (
        (LONG, {"max_chunks": 3}, InputTooLongError, r"item 1 has \d+ tokens and 3 chunks \(max_chunks\) hold 108: sh"),
        ("a " * 99, {"stride": 38}, InputError, r"^chunks share 38 tokens \(stride\) and hold 38: give a smaller"),
        (chat, {}, InputError, "item 1 is a conversation, and only texts are read in chunks"),
        (("a " * 60, "b"), {}, InputTooLongError, r"the query needs 64 tokens .*\(of a pair, the first text\)"),
        (" ", {}, EmptyInputError, "item 1 is empty"),
    ):
        with pytest.raises(error, match=words):
            encode_chunks(codec, ["b", item], Chunks.model_validate(options))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("yes", "chunks is 'yes': give true, or an object with stride, aggregate, max_chunks"),
        ({"strides": 3}, "chunks.strides: extra inputs are not permitted"),
        ({"aggregate": "median"}, "chunks.aggregate: input should be 'max' or 'mean'"),
        ({"max_chunks": 0}, "chunks.max_chunks: input should be greater than or equal to 1"),
    ],
)
def test_a_setting_that_is_none_says_which(value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Chunks.of(value)
    assert str(caught.value) == words


def softmax(logits: Any) -> Any:
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-logits))


def stock_model(directory: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(directory).eval()


def stock_logits(model: Any, rows: list[Encoded]) -> Any:
    """transformers' logits of each row by itself."""
    import torch

    with torch.no_grad():
        made = [
            model(input_ids=torch.tensor([row.ids]), token_type_ids=torch.tensor([row.types])).logits for row in rows
        ]
    return torch.cat(made).double().numpy()


def test_each_label_has_the_greatest_or_the_mean_score_of_the_chunks(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Probabilities after the activation, raw ones as logits; a text that fits has the scores that it has without."""
    directory = reranker(make_checkpoint("bert", num_hidden_layers=1), tmp_path / "m")
    items: list[Any] = ["the firm", LONG[:400], ("the firm is", LONG[:500]), LONG[:260]]

    async def work(engine: Engine) -> None:
        tokenizer, model = engine.codec._stock, stock_model(directory)
        for how, of in (("max", np.max), ("mean", np.mean)):
            chunks = Chunks.model_validate({"stride": 3, "aggregate": how})
            for raw, activation in ((True, np.asarray), (False, softmax)):
                answer = await engine.classify(items, RAW if raw else OWN, chunks=chunks)
                for item, scores in zip(items, answer.scores, strict=True):
                    first, text = (None, item) if isinstance(item, str) else item
                    logits = stock_logits(model, stock_chunks(tokenizer, first, text, 3, "right"))
                    expected = of(activation(logits), axis=0)
                    found = {each.label: each.score for each in scores}
                    names = [engine.codec.record.labels[n] for n in range(3)]
                    np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-5)
                    assert [each.score for each in scores] == sorted(found.values(), reverse=True)
        plain = await engine.classify(items[:1])
        assert (await engine.classify(items[:1], chunks=Chunks())).scores == plain.scores
        with pytest.raises(InputTooLongError, match="item 1 has"):
            await engine.classify(items)

    with_engine(directory, work)


def test_a_document_is_as_relevant_as_its_best_chunk(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The whole query before each chunk; the order is that of the aggregated scores."""
    directory = reranker(make_checkpoint("bert", num_labels=1, num_hidden_layers=1), tmp_path / "m")
    texts = [*documents(12), LONG[:500]]
    tokenizer = cross_encoder(directory).tokenizer

    async def work(engine: Engine) -> None:
        model = stock_model(directory)
        rows = [stock_chunks(tokenizer, QUERY, text, 3, "right") for text in texts]
        logits = [stock_logits(model, of_one)[:, 0] for of_one in rows]
        assert max(map(len, rows)) > 3
        for how, of in (("max", np.max), ("mean", np.mean)):
            for raw, activation in ((True, np.asarray), (False, sigmoid)):
                expected = [of(activation(of_one)) for of_one in logits]
                chunks = Chunks.model_validate({"stride": 3, "aggregate": how, "max_chunks": 64})
                ranking = await engine.rerank(QUERY, texts, RAW if raw else OWN, chunks=chunks)
                scores = {each.index: each.score for each in ranking.documents}
                np.testing.assert_allclose([scores[n] for n in range(len(texts))], expected, atol=1e-5)
                assert [each.index for each in ranking.documents] == np.argsort(-np.array(expected)).tolist()
                assert ranking.tokens == sum(len(row) for of_one in rows for row in of_one)
        with pytest.raises(PayloadTooLargeError, match="these texts make more than 100 chunks"):
            await engine.rerank(QUERY, [LONG] * 8, chunks=Chunks())
        with pytest.raises(PayloadTooLargeError, match="these texts make more than 100 chunks"):
            await engine.classify([LONG] * 8, truncate=True, chunks=Chunks())
        with pytest.raises(EmptyInputError, match="item 1 is empty"):
            await engine.rerank(QUERY, ["a", " "], chunks=Chunks())

    with_engine(directory, work, max_concurrent_requests=100)


def test_an_error_of_a_chunk_names_its_text(with_fake_engine: WithEngine) -> None:
    """Also one that comes from the ranks."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        token = engine.codec.encode(["apples"])[0].ids[1]
        executor.raise_on(lambda ids: bool((ids == token).any()), "no apples")
        with pytest.raises(StepError, match=r"^item 2 .*no apples"):
            await engine.classify(["a", "b " * 900, "c " * 900 + "apples"], chunks=Chunks())

    with_fake_engine(work)


def test_the_doors_take_chunks(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """`/predict`, and both bodies of `/rerank`, each answered as its own clients expect."""
    directory = reranker(make_checkpoint("bert", num_labels=1, num_hidden_layers=1), tmp_path / "m")
    texts = [*documents(6), LONG[:500]]

    async def work(engine: Engine) -> None:
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:

            async def ask(path: str, **body: Any) -> tuple[int, Any]:
                answer = await http.post(path, json=body)
                return answer.status_code, answer.json()

            mean = {"stride": 2, "aggregate": "mean"}
            status, found = await ask("/predict", inputs=[[LONG[:300]]], chunks=mean)
            (expected,) = (await engine.classify([LONG[:300]], chunks=Chunks.of(mean))).scores
            assert (status, found) == (200, [[{"score": pytest.approx(expected[0].score), "label": "LABEL_0"}]])
            assert (await ask("/predict", inputs=LONG[:300], chunks=True))[0] == 200
            assert (await ask("/predict", inputs=LONG[:300], chunks=False, truncate=False))[0] == 422
            for wrong, words in (
                ("yes", "`chunks`: input should be an object"),
                ({"stride": -1}, "`chunks.stride`: input should be greater than or equal to 0"),
                ({"strid": 1}, "`chunks.strid` is not known here: leave it out; there are stride"),
            ):
                status, found = await ask("/predict", inputs="a", chunks=wrong)
                assert (status, found["error"][: len(words)]) == (422, words)
            ranking = await engine.rerank(QUERY, texts, chunks=Chunks())
            order = [each.index for each in ranking.documents]
            status, found = await ask("/rerank", query=QUERY, texts=texts, chunks=True)
            assert [each["index"] for each in found] == order
            for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
                for more in ({"max_chunks_per_doc": 16}, {"chunks": True}):
                    objects = [{"text": text} for text in texts]
                    status, found = await ask(path, query=QUERY, documents=objects, model="texts", top_n=3, **more)
                    assert [each["index"] for each in found["results"]] == order[:3]
                status, found = await ask(path, query=QUERY, documents=["", "a"])
                assert (status, found) == (400, {"message": "`documents`: item 0 is empty: send some text"})
                status, found = await ask(path, query=QUERY, documents=["a"], max_chunks_per_doc=2, chunks=True)
                assert (status, found["message"][:44]) == (422, "`max_chunks_per_doc` and `chunks` say the sa")
            status, found = await ask("/rerank", query=QUERY, texts=['a "documents": b', ""])
            assert (status, found["error"]) == (400, "`texts`: item 1 is empty: send some text")
            schema = (await http.get("/openapi.json")).json()["paths"]["/rerank"]["post"]["requestBody"]
            assert "$ref" not in json.dumps(schema)

    with_engine(directory, work)


def test_pairs_that_a_template_writes_are_not_read_in_chunks(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from tests.serving.test_chat import save
    from tests.serving.test_rerank import PAIR_TEMPLATE
    from tpray.serving.relevance import Relevance

    base = reranker(make_checkpoint("qwen3", num_labels=1, num_hidden_layers=1), tmp_path / "base")
    save(base, tmp_path / "pairs", PAIR_TEMPLATE, [])
    codec = TextCodec(tmp_path / "pairs", record(("a",)))
    relevance = Relevance.of(tmp_path / "pairs", codec)
    with pytest.raises(UnsupportedTaskError, match="mine has pairs written by its chat template"):
        relevance.rows(codec, "a", ["b"], True, None, float("inf"), Chunks())
