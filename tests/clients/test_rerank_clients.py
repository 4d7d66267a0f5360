"""Clients that people have for reranking and for vLLM, against a server on loopback: the order of CrossEncoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest

from tests.clients.loopback import loopback

QUERY = "where is the firm"
DOCUMENTS = ["the firm is in Paris", "hello " * 90, "good morning to the train", "a"]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("bert", num_labels=1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with loopback(checkpoint) as server:
        yield server.url


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[tuple[int, float]]:
    """Numbers and scores, the best first."""
    from sentence_transformers import CrossEncoder

    found = CrossEncoder(str(checkpoint), device="cpu", model_kwargs={"dtype": "float32"}).rank(QUERY, DOCUMENTS)
    return [(each["corpus_id"], float(each["score"])) for each in found]


def check(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [number for number, _ in found] == [number for number, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=1e-5)


def test_coheres_clients(url: str, expected: list[tuple[int, float]]) -> None:
    first: Any = cohere.Client("key", base_url=url)
    second: Any = cohere.ClientV2("key", base_url=url)
    for client in (first, second):
        answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=3)
        check([(each.index, each.relevance_score) for each in answer.results], expected[:3])
        assert answer.meta.tokens.input_tokens > 0
    asked = {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS], "return_documents": True}
    old = first.rerank(**asked)
    check([(each.index, each.relevance_score) for each in old.results], expected)
    assert [each.document.text for each in old.results] == [DOCUMENTS[number] for number, _ in expected]
    short = second.rerank(model="m", query=QUERY, documents=DOCUMENTS[:1], max_tokens_per_doc=1)
    assert short.results[0].relevance_score != pytest.approx(dict(expected)[0], abs=1e-6)
    with pytest.raises(cohere.UnprocessableEntityError) as caught:
        second.rerank(model="m", query=QUERY, documents=["a", ""], priority=3)
    assert "`priority`: input should be 0" in str(caught.value.body)


def test_jinas_body(url: str, expected: list[tuple[int, float]]) -> None:
    """What Jina's documentation sends."""
    body = {"model": "jina-reranker-v2-base-multilingual", "query": QUERY, "documents": DOCUMENTS, "top_n": 4}
    answer = httpx.post(f"{url}/v1/rerank", json=body | {"return_documents": False, "truncation": True}).json()
    check([(each["index"], each["relevance_score"]) for each in answer["results"]], expected)
    assert answer["usage"]["total_tokens"] > 0
    refused = httpx.post(f"{url}/v1/rerank", json=body | {"truncation": False})
    assert (refused.status_code, "`documents`: item 1 has" in refused.json()["message"]) == (422, True)


@pytest.mark.parametrize("model", ["infinity/m", "hosted_vllm/m", "jina_ai/m", "cohere/m", "huggingface/m"])
def test_litellm(model: str, url: str, expected: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it phones home at its import
    import litellm

    base = f"{url}/infinity" if model == "infinity/m" else url
    asked: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS, "api_base": base, "api_key": "key"}
    if model == "huggingface/m":  # it sends truncate: false
        asked["documents"] = [text[:30] for text in DOCUMENTS]
        expected = [each for each in expected if each[0] != 1]
    answer = litellm.rerank(model=model, **asked)
    found = [(each["index"], each["relevance_score"]) for each in answer.results]
    check([each for each in found if each[0] in dict(expected)], expected)
    assert [each["document"]["text"] for each in answer.results] == [asked["documents"][n] for n, _ in found]
    short = litellm.rerank(model=model, top_n=2, return_documents=False, **asked)
    if model != "huggingface/m":
        assert [each["index"] for each in short.results] == [number for number, _ in expected[:2]]
    if model == "hosted_vllm/m":
        cut = litellm.rerank(model=model, truncate_prompt_tokens=20, truncation_side="left", **asked)
        assert len(cut.results) == len(DOCUMENTS)


def test_llama_indexs_reranker(url: str, expected: list[tuple[int, float]]) -> None:
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(DOCUMENTS)]
    found = TextEmbeddingInference(base_url=url, top_n=4).postprocess_nodes(nodes, QueryBundle(QUERY))
    check([(int(node.node.node_id), float(node.score or 0)) for node in found], expected)


def test_openais_client(url: str, expected: list[tuple[int, float]]) -> None:
    """It lists the models, and sends what vLLM's examples send with it."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="key")
    (model,) = client.models.list().data
    assert (model.id, model.object) == (httpx.get(f"{url}/info").json()["model_id"], "model")
    pairs = client.post("/score", body={"text_1": QUERY, "text_2": DOCUMENTS[0]}, cast_to=httpx.Response)
    assert pairs.json()["data"][0]["score"] == pytest.approx(dict(expected)[0], abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="there are 2 queries and 3 documents") as caught:
        client.post("/score", body={"text_1": ["a"] * 2, "text_2": ["b"] * 3}, cast_to=httpx.Response)
    assert caught.value.type == "BadRequestError"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="a")
