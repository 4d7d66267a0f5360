"""What people ask text-embeddings-inference with: plain HTTP, LlamaIndex, LiteLLM; answers are stock transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.clients.loopback import loopback

Make = Callable[..., Path]
QUERY = "the firm"
TEXTS = ["apples are bad", "the company is in Paris", "é 🙂 the firm", "x"]


@pytest.fixture(scope="module")
def reranker(make_checkpoint: Make) -> Path:
    return make_checkpoint("bert", num_hidden_layers=1, num_labels=1)


@pytest.fixture(scope="module")
def url(reranker: Path) -> Iterator[str]:
    with loopback(reranker, tp=1, max_client_batch_size=4) as served:
        yield served.url


def stock_scores(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = [model(**tokenizer(QUERY, text, return_tensors="pt")).logits[0, 0] for text in TEXTS]
    return torch.sigmoid(torch.stack(logits)).numpy()


def test_predict_and_rerank_give_the_stock_scores(url: str, reranker: Path) -> None:
    expected = stock_scores(reranker)
    pairs = [[QUERY, text] for text in TEXTS]
    predicted = httpx.post(f"{url}/predict", json={"inputs": pairs, "truncate": None}).json()
    np.testing.assert_allclose([scores[0]["score"] for scores in predicted], expected, atol=1e-5)
    ranked = httpx.post(f"{url}/rerank", json={"query": QUERY, "texts": TEXTS, "return_text": None}).json()
    assert [each["index"] for each in ranked] == np.argsort(-expected, kind="stable").tolist()
    np.testing.assert_allclose([each["score"] for each in ranked], np.sort(expected)[::-1], atol=1e-5)
    info = httpx.get(f"{url}/info").json()
    assert info["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}


def test_llama_index_reranks(url: str, reranker: Path) -> None:
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in TEXTS]
    client = TextEmbeddingInference(base_url=url, top_n=2)
    found = client.postprocess_nodes(nodes, query_bundle=QueryBundle(QUERY))
    expected = stock_scores(reranker)
    assert [each.node.get_content() for each in found] == [TEXTS[n] for n in np.argsort(-expected)[:2]]


def test_litellm_reranks(url: str, reranker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network at its import
    import litellm

    for top_n in (None, 2):
        found = litellm.rerank(
            model="huggingface/any", query=QUERY, documents=TEXTS, top_n=top_n, api_base=url, api_key="none"
        )
        expected = np.argsort(-stock_scores(reranker))[:top_n].tolist()
        assert [each["index"] for each in found.results] == expected


@pytest.mark.parametrize("special", [True, False, None])
def test_tokens_and_their_text(special: bool | None, url: str, reranker: Path) -> None:
    """Ids as transformers has them; start and stop count bytes, as TEI's do."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reranker)
    answer = httpx.post(f"{url}/tokenize", json={"inputs": TEXTS, "add_special_tokens": special}).json()
    kept = special is not False
    for text, tokens in zip(TEXTS, answer, strict=True):
        assert [each["id"] for each in tokens] == tokenizer(text, add_special_tokens=kept)["input_ids"]
        for each in tokens:
            assert each["special"] == (each["start"] is None)
            if not each["special"]:
                assert text.encode()[each["start"] : each["stop"]].decode() == each["text"]
        ids = [each["id"] for each in tokens]
        for skip in (True, False):
            said = httpx.post(f"{url}/decode", json={"ids": ids, "skip_special_tokens": skip}).json()
            assert said == [tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)]
    both = [[each["id"] for each in tokens] for tokens in answer]
    assert len(httpx.post(f"{url}/decode", json={"ids": both}).json()) == len(TEXTS)
    assert httpx.post(f"{url}/tokenize", json={"inputs": TEXTS[0], "add_special_tokens": special}).json() == answer[:1]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {"inputs": []}, 400, "`inputs` is empty: send at least one"),
        ("/tokenize", {"inputs": ["a", ""]}, 400, "`inputs`: item 1 is empty"),
        ("/tokenize", {"inputs": ["a"] * 5}, 413, "`inputs` has 5 items and the limit is 4"),
        ("/tokenize", {"inputs": "a" * 140_000}, 413, "`inputs` has 140000 characters and the limit is 131072 here"),
        ("/tokenize", {"inputs": "a", "prompt_name": "query"}, 422, "`prompt_name`: input should be"),
        ("/tokenize", {"text": "a"}, 422, "`inputs`: field required"),
        ("/decode", {"ids": []}, 400, "`ids` is empty"),
        ("/decode", {"ids": [[3], []]}, 400, "`ids`: item 1 is empty: send some token ids"),
        ("/decode", {"ids": [3, 10**9]}, 422, "`ids`: item 0 has the token id 1000000000, which the tokenizer lacks"),
        ("/decode", {"ids": [3, 10**30]}, 422, "`ids`: item 0 has the token id"),
        ("/decode", {"ids": [-1]}, 422, "`ids`: item 0: input should be greater than or equal to 0"),
        ("/decode", {"ids": ["3"]}, 422, "`ids` has the wrong type: send token ids, such as [2, 20, 3], or a list"),
        ("/decode", {"ids": [[3], 2.5]}, 422, "`ids` has the wrong type"),
        ("/decode", {"ids": [3], "inputs": "a"}, 422, "`inputs` is not known here: leave it out; there are ids, skip"),
        ("/rerank", {"query": "a", "texts": ["b"], "top": 1}, 422, "`top` is not known here"),
        ("/rerank", {"query": "a", "texts": ["b"], "top_n": 0}, 422, "`top_n`: input should be greater than"),
        ("/rerank", {"query": "a", "texts": ["b", 1]}, 422, "`texts`: item 1: input should be a valid string"),
    ],
)
def test_mistakes_are_explained(path: str, body: dict[str, Any], status: int, words: str, url: str) -> None:
    answer = httpx.post(f"{url}{path}", json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert words in answer.json()["error"]
