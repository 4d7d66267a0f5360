"""Reranking: order and scores of sentence-transformers' `CrossEncoder`, what a checkpoint says of them, the doors."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.test_chat import save
from tests.text_kinds import WORDS
from tpray.artifacts.manifest import ModelRecord
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import EmptyInputError, InputError, InputTooLongError, PayloadTooLargeError, UnsupportedTaskError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.engine import Engine
from tpray.serving.http import make_app
from tpray.serving.relevance import Relevance
from tpray.serving.scores import OWN, RAW, Scoring
from tpray.tokenizer import stock_rows

QUERY = "where is the firm"
MOST = 40
"""Tokens of a row, for which the tokenizers' model_max_length is set: some documents are longer."""

PAIR_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}] {% endif %}{% if m.role == 'query' %}<Query>: "
    "{{ m.content }}\n{% endif %}{% if m.role == 'document' %}<Document>: {{ m.content }}{% endif %}{% endfor %}"
)


def documents(count: int) -> list[str]:
    """Of 1 to about 60 words, the longest to be cut; no two are alike."""
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS, size=1 + (7 * n) % 60)) + f" {n}" for n in range(count)]


def reranker(checkpoint: Path, target: Path, **config: Any) -> Path:
    """A copy whose rows have `MOST` tokens, with further keys in config.json."""
    shutil.copytree(checkpoint, target)
    for name, more in (("tokenizer_config.json", {"model_max_length": MOST}), ("config.json", config)):
        file = target / name
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return target


def cross_encoder(directory: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(directory), device="cpu", model_kwargs={"dtype": "float32"})


def with_engine(directory: Path, work: Callable[[Engine], Awaitable[None]], **limits: Any) -> None:
    async def run() -> None:
        group = ClassifierGroup(ModelConfig(source=str(directory), dtype="float32"), ThreadExecutor(2))
        engine = Engine(group, BatchConfig.model_validate(limits))
        await engine.start()
        try:
            await work(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


def check(directory: Path, texts: list[str], query: str = QUERY, raw: bool = False, **limits: Any) -> None:
    """The order and the scores of `CrossEncoder.predict`, of all documents and of the best three."""
    import torch

    stock = cross_encoder(directory)
    pairs, prompt = [(query, text) for text in texts], stock.prompts.get(stock.default_prompt_name, "")
    expected = stock.predict(pairs, **({"activation_fn": torch.nn.Identity()} if raw else {}))
    order = [each["corpus_id"] for each in stock.rank(query, texts)]

    async def work(engine: Engine) -> None:
        ranking = await engine.rerank(query, texts, RAW if raw else OWN)
        scores = {each.index: each.score for each in ranking.documents}
        bound = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose([scores[n] for n in range(len(texts))], expected, atol=bound, rtol=0)
        assert [each.index for each in ranking.documents] == order
        best = await engine.rerank(query, texts, Scoring("none" if raw else None, 3))
        assert [each.index for each in best.documents] == order[:3]
        rows = stock_rows(stock.tokenizer, [(prompt + query, text) for text in texts], MOST)
        assert ranking.tokens == sum(map(len, rows))

    with_engine(directory, work, **limits)


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "modernbert", "qwen3"])
def test_order_and_scores_are_those_of_cross_encoder(
    model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """More documents than one request may have items, some of them cut; each model with a tokenizer of its kind."""
    directory = reranker(make_checkpoint(model_type, num_labels=1, num_hidden_layers=1), tmp_path / "m")
    check(directory, documents(40), max_client_batch_size=8)


IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    "config",
    [
        {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0"}},
        {"sbert_ce_default_activation_function": IDENTITY},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid", "problem_type": "regression"},
        {"sentence_transformers": {"activation_fn": "mine.Activation"}},
    ],
)
def test_the_checkpoint_says_which_activation_scores_have(
    config: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In either key; one that is not torch's is not run, here as there."""
    directory = reranker(make_checkpoint("bert", num_labels=1, num_hidden_layers=1), tmp_path / "m", **config)
    relevance = Relevance.of(directory, TextCodec(directory, record(("a",))))
    assert relevance.activation == type(cross_encoder(directory).activation_fn).__name__


def test_a_folder_that_cross_encoder_saved_with_prompts_and_an_activation(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    stock = cross_encoder(reranker(make_checkpoint("bert", num_labels=1, num_hidden_layers=1), tmp_path / "m"))
    stock.activation_fn = torch.nn.Identity()
    stock.prompts, stock.default_prompt_name = {"find": "a: "}, "find"
    stock.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modules.json").is_file()
    check(tmp_path / "saved", documents(9))
    check(tmp_path / "saved", documents(9), raw=True)


def test_a_template_of_query_and_document_writes_the_pair(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As CrossEncoder has it; a template of other roles does not, and pairs are texts."""
    base = reranker(make_checkpoint("qwen3", num_labels=1, num_hidden_layers=1), tmp_path / "base")
    save(base, tmp_path / "pairs", PAIR_TEMPLATE, [])
    texts = [text[:30] for text in documents(6)]
    expected = cross_encoder(tmp_path / "pairs").predict([("the firm", text[:20]) for text in texts])

    async def work(engine: Engine) -> None:
        ranking = await engine.rerank("the firm", [text[:20] for text in texts])
        scores = {each.index: each.score for each in ranking.documents}
        np.testing.assert_allclose([scores[n] for n in range(len(texts))], expected, atol=1e-5)
        with pytest.raises(
            InputTooLongError, match=r"item 1 makes a conversation of more than 40 .* it is not cut: shorten it"
        ):
            await engine.rerank("the firm", ["a", "the firm " * 40])

    with_engine(tmp_path / "pairs", work)
    codec = TextCodec(tmp_path / "pairs", record(("a",)))
    assert Relevance.of(tmp_path / "pairs", codec).chat
    save(base, tmp_path / "other", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}!", [])
    assert not Relevance.of(tmp_path / "other", TextCodec(tmp_path / "other", record(("a",)))).chat


def record(labels: tuple[str, ...], model_type: str = "bert") -> ModelRecord:
    return ModelRecord(
        source="mine", revision=None, digest="", model_type=model_type, max_length=MOST, labels=labels, pad_id=0,
        problem_type=None, vocab_size=10_000, token_types=2, plan={"rules": []},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "files", "words"),
    [
        (("a", "b", "c"), {}, "mine has 3 labels \\(a, b, c\\), and reranking takes a model with one, or with two"),
        (("a",), {"config.json": {"sentence_transformers": {"activation_fn": "torch.Tanh"}}}, "scores with torch.Tanh"),
        (
            ("a",),
            {"modules.json": [{"type": "sentence_transformers.models.Transformer"}, {"type": "x.Dense"}]},
            "modules of sentence-transformers' behind the model .modules.json: x.Dense",
        ),
        (
            ("a",),
            {
                "modules.json": [{"type": "x.Transformer"}],
                "config_sentence_transformers.json": {"model_type": "CrossEncoder", "default_prompt_name": "find"},
            },
            "default_prompt_name in config_sentence_transformers.json is 'find', and prompts has none",
        ),
    ],
)  # fmt: skip
def test_what_is_no_reranker_that_tpray_runs_is_refused_by_name(
    labels: tuple[str, ...], files: dict[str, Any], words: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = reranker(make_checkpoint("bert"), tmp_path / "m")
    if "modules.json" in files:
        files = {"config_sentence_transformers.json": {"model_type": "CrossEncoder"}} | files
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    with pytest.raises(UnsupportedTaskError, match=words):
        Relevance.of(directory, TextCodec(directory, record(labels)))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_two_values_that_do_not_exclude_each_other_rank_nothing(
    problem_type: str, make_checkpoint: Callable[..., Path]
) -> None:
    """Their softmax would be no number that the model was trained for."""
    directory, two = make_checkpoint("bert"), record(("a", "b")).model_copy(update={"problem_type": problem_type})
    with pytest.raises(UnsupportedTaskError, match=f"two values that do not .* .problem_type {problem_type}"):
        Relevance.of(directory, TextCodec(directory, two))


def test_of_two_labels_the_second_is_the_relevant_one(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Its probability; raw, the difference of the logits, which has the same order."""
    directory = reranker(make_checkpoint("bert", num_labels=2, num_hidden_layers=1), tmp_path / "m")
    texts = documents(9)
    logits = cross_encoder(directory).predict([(QUERY, text) for text in texts])

    async def work(engine: Engine) -> None:
        for raw, expected in (
            (True, logits[:, 1] - logits[:, 0]),
            (False, np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)),
        ):
            ranking = await engine.rerank(QUERY, texts, RAW if raw else OWN)
            scores = {each.index: each.score for each in ranking.documents}
            np.testing.assert_allclose([scores[n] for n in range(9)], expected, atol=1e-5)
            assert [each.index for each in ranking.documents] == np.argsort(-expected).tolist()

    with_engine(directory, work)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "xlm", "roformer"])
@pytest.mark.parametrize("side", ["Left", "Right"])
def test_only_the_document_is_cut(
    side: Direction, model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The ids of transformers' ``only_second``, as FlagEmbedding asks for; a query that leaves no room is refused."""
    directory = reranker(make_checkpoint(model_type), tmp_path / "m")
    codec = TextCodec(directory, record(("a",), model_type))
    tokenizer = codec._stock
    texts, query = [*documents(12), "the firm is in Paris " * 900], "the firm is"
    made = [row for (row,) in codec.encode_after([query], texts, MOST, True, side)]
    assert made == stock_rows(tokenizer, [(query, text) for text in texts], MOST, side.lower(), "only_second")
    assert codec.encode_after([query], texts[:1], MOST, False)[0] == codec.encode([(query, texts[0])])
    with pytest.raises(InputTooLongError, match=r"item 1 has .*and this model takes 40"):
        codec.encode_after([query], [texts[0], texts[-1]], MOST, False)
    for long in (query * 30, query * 5000):
        with pytest.raises(InputTooLongError, match=r"the query needs \d+ tokens .*only documents are cut"):
            codec.encode_after([long], texts, MOST, True)


def test_errors_name_the_query_or_the_document(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = reranker(make_checkpoint("bert", num_labels=1, num_hidden_layers=1), tmp_path / "m")

    async def work(engine: Engine) -> None:
        for query, texts, options, error, words in (
            ("", ["a"], {}, EmptyInputError, "^the query is empty: send some text"),
            ("a\0", ["a"], {}, InputError, "^the query has a NUL character"),
            ("a", ["b", " "], {}, EmptyInputError, "^item 1 is empty"),
            ("a", [], {}, EmptyInputError, "^there are no documents to rank"),
            ("a", ["b"] * 17, {}, PayloadTooLargeError, "^there are 17 documents and the limit is 16"),
            ("a", ["b"], {"scoring": Scoring("softmax")}, InputError, "^this model has one label, whose softmax"),
            ("a", ["c " * 60, "b"], {"truncate": False}, InputTooLongError, "^item 0 has 6[0-9] tokens"),
        ):
            with pytest.raises(error, match=words):
                await engine.rerank(query, texts, **options)
        ranking = await engine.rerank("a", ["b"] * 16)
        assert [each.index for each in ranking.documents] == list(range(16)), "equal ones stay in their order"

    with_engine(directory, work, max_concurrent_requests=16)


def test_the_doors(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """TEI's and Cohere's: sorted, with the texts if asked for; errors in their words; documented."""
    directory = reranker(make_checkpoint("bert", num_labels=1, num_hidden_layers=1), tmp_path / "m")
    texts = [f"{text} é" for text in documents(7)]

    async def work(engine: Engine) -> None:
        expected = (await engine.rerank(QUERY, texts)).documents
        order = [each.index for each in expected]
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            answer = await http.post("/rerank", json={"query": QUERY, "texts": texts, "return_text": True})
            assert [set(each) for each in answer.json()] == [{"index", "score", "text"}] * 7
            assert [each["index"] for each in answer.json()] == order
            assert [each["text"] for each in answer.json()] == [texts[n] for n in order]
            np.testing.assert_allclose(
                [each["score"] for each in answer.json()], [e.score for e in expected], atol=1e-6
            )
            assert int(answer.headers["x-compute-tokens"]) > 7
            raw = await http.post("/rerank", json={"query": QUERY, "texts": texts, "raw_scores": True})
            assert [set(each) for each in raw.json()] == [{"index", "score"}] * 7
            sigmoid = 1 / (1 + np.exp([-each["score"] for each in raw.json()]))
            np.testing.assert_allclose(sigmoid, [e.score for e in expected], atol=1e-6)
            for path in ("/v1/rerank", "/v2/rerank"):
                mixed = [texts[0], *({"text": text} for text in texts[1:])]
                body = {"model": "m", "query": QUERY, "documents": mixed, "top_n": 2, "return_documents": True}
                found = (await http.post(path, json=body | {"max_tokens_per_doc": None})).json()
                assert [each["index"] for each in found["results"]] == order[:2]
                assert [each["document"] for each in found["results"]] == [{"text": texts[n]} for n in order[:2]]
                assert found["usage"]["total_tokens"] == found["meta"]["tokens"]["input_tokens"] > 0
            cases: list[tuple[str, Any, int, str]] = [
                ("/rerank", {"query": "a", "texts": ["b", ""]}, 400, "`texts`: item 1 is empty"),
                ("/rerank", {"query": "", "texts": ["b"]}, 400, "the query is empty"),
                ("/rerank", {"query": "a"}, 422, "`texts`: field required"),
                ("/rerank", {"query": "a", "texts": ["b " * 90], "truncate": False}, 422, "`texts`: item 0 has 9"),
                ("/rerank", {"query": "a", "texts": ["b"] * 600}, 413, "there are 600 documents"),
                ("/v1/rerank", {"query": "a", "documents": ["b", ""]}, 400, "`documents`: item 1 is empty"),
                (
                    "/v2/rerank",
                    {"query": "a", "documents": ["b"], "rank_fields": ["x"]},
                    422,
                    "`rank_fields` is not known",
                ),
                ("/v2/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 422, "`top_n`: input should be greater"),
                ("/v2/rerank", {"query": "a", "documents": ["b"], "top_n": "1"}, 422, "`top_n`: input should be a val"),
                (
                    "/v2/rerank",
                    {"query": "a", "documents": [{"text": "b", "title": "c"}]},
                    422,
                    "`documents.title` is not known",
                ),
            ]
            for path, wrong, status, words in cases:
                answer = await http.post(path, json=wrong)
                assert answer.status_code == status, answer.text
                said = answer.json()
                assert words in (said["error"] if path == "/rerank" else said["message"])
            paths = (await http.get("/openapi.json")).json()["paths"]
            assert {"/rerank", "/v1/rerank", "/v2/rerank"} <= set(paths)

    with_engine(directory, work)


def test_a_model_with_three_labels_says_so_over_http(make_checkpoint: Callable[..., Path]) -> None:
    async def work(engine: Engine) -> None:
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            answer = await http.post("/rerank", json={"query": "a", "texts": ["b"]})
            assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")
            assert "has 3 labels (LABEL_0, LABEL_1, LABEL_2)" in answer.json()["error"]

    with_engine(make_checkpoint("bert"), work)
