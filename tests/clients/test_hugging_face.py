"""`huggingface_hub.InferenceClient` asks, and gets what transformers' pipelines give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.loopback import loopback

TEXTS = ["the firm is in Paris", "x", "Ça n'est pas vrai: 🙂"]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def text_model(make_checkpoint: Make) -> Path:
    return make_checkpoint("bert", num_hidden_layers=1)


@pytest.fixture(scope="module")
def url(text_model: Path) -> Iterator[str]:
    with loopback(text_model, tp=1, max_client_batch_size=4) as served:
        yield served.url


@pytest.fixture(scope="module")
def token_url(make_checkpoint: Make) -> Iterator[str]:
    labels = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    directory = make_checkpoint(
        "bert", num_hidden_layers=1, architectures=["ForTokenClassification"], id2label=labels, num_labels=5
    )
    with loopback(directory, tp=1) as served:
        yield f"{served.url} {directory}"


def same(found: Any, expected: Any) -> None:
    """Labels, in order, and their scores."""
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"top_k": 1}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "none", "top_k": 2},
     {"function_to_apply": "softmax"}],
)  # fmt: skip
def test_a_text_has_the_pipelines_labels(parameters: dict[str, Any], url: str, text_model: Path) -> None:
    from transformers import pipeline

    stock = pipeline("text-classification", model=str(text_model), device="cpu")
    client = InferenceClient(base_url=url)
    for text in TEXTS:
        same(client.text_classification(text, **parameters), stock(text, **({"top_k": None} | parameters)))
    answer = httpx.post(url, json={"inputs": TEXTS, "parameters": parameters}).json()
    for found, text in zip(answer, TEXTS, strict=True):
        same(found, stock(text, **({"top_k": None} | parameters)))
    pair = {"text": TEXTS[0], "text_pair": "a pair"}
    (found,) = httpx.post(f"{url}/models/me/mine", json={"inputs": pair, "parameters": parameters}).json()
    same(found, stock(pair, **({"top_k": None} | parameters)))


def test_any_name_and_no_other_path(url: str) -> None:
    client = InferenceClient()
    by_name = client.text_classification("x", model=f"{url}/models/someone/something")
    assert by_name == client.text_classification("x", model=f"{url}/models/something")
    with pytest.raises(HfHubHTTPError, match="404"):
        client.text_classification("x", model=f"{url}/models/someone/something/pipeline/feature-extraction")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"parameters": {"candidate_labels": ["a"]}}, 422, "of zero-shot classification, and this model does text"),
        ({"parameters": {"aggregation_strategy": "simple"}}, 422, "of token classification"),
        ({"parameters": {"topk": 1}}, 422, "`parameters.topk` is not known here: leave it out; there are function"),
        ({"parameters": {"top_k": 0}}, 422, "`parameters.top_k`: input should be greater than or equal to 1"),
        ({"parameters": {"top_k": "1"}}, 422, "`parameters.top_k`: input should be a valid integer"),
        ({"parameters": {"function_to_apply": "relu"}}, 422, "`parameters.function_to_apply`: input should be 'softm"),
        ({"options": {"wait_for_model": True}}, 422, "`options` is not known here"),
        ({"truncate": True}, 422, "`truncate` is an option of POST /predict"),
        ({"inputs": {"question": "who", "context": "me"}}, 422, "`inputs.question` is not known here"),
        ({"inputs": ["a", ""]}, 400, "`inputs`: item 1 is empty"),
        ({"inputs": []}, 400, "`inputs` is empty"),
        ({"inputs": ["a"] * 5}, 413, "`inputs` has 5 items and the limit is 4"),
        ({"inputs": 7}, 422, "`inputs` has the wrong type: send a text, or {text, text_pair}, or a list of these"),
        ({"inputs": [["a", "b"]]}, 422, "`inputs` has the wrong type"),
        ({"inputs": [[{"text": "a", "text_pair": 3}]]}, 422, "`inputs` has the wrong type"),
        ({"inputs": "a " * 90, "parameters": {"truncation": False}}, 422, "shorten it, or set `truncation` to true"),
    ],
)
def test_what_is_not_known_is_refused_by_name(body: dict[str, Any], status: int, words: str, url: str) -> None:
    answer = httpx.post(url, json={"inputs": "a"} | body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert words in answer.json()["error"]


def test_options_may_be_null(url: str) -> None:
    nulls = dict.fromkeys(("function_to_apply", "top_k", "truncation"))
    plain = httpx.post(url, json={"inputs": "a"}).json()
    for parameters in (None, {}, nulls):
        assert httpx.post(url, json={"inputs": "a", "parameters": parameters}).json() == plain
    assert httpx.post(url, json={"inputs": {"text": "a", "text_pair": None}}).json() == plain


def test_the_client_is_told_what_is_wrong(url: str) -> None:
    client = InferenceClient(base_url=url)
    with pytest.raises(HfHubHTTPError, match="zero-shot classification, and this model does text classification"):
        client.zero_shot_classification("a text", ["one", "other"])
    with pytest.raises(HfHubHTTPError, match="is empty: send some text"):
        client.text_classification(" ")


def test_tokens_have_the_pipelines_labels(token_url: str) -> None:
    from transformers import pipeline

    url, directory = token_url.split(" ")
    stock = pipeline("token-classification", model=directory, device="cpu")
    client = InferenceClient(base_url=url)
    for asked in ({}, {"aggregation_strategy": "max"}, {"aggregation_strategy": "none", "ignore_labels": []}):
        found: list[Any] = client.token_classification(TEXTS[0], **asked)
        expected = stock(TEXTS[0], **({"aggregation_strategy": "simple"} | asked))
        assert found
        for one, other in zip(found, expected, strict=True):
            assert {k: v for k, v in one.items() if k in other and k != "score"} == {
                k: v for k, v in other.items() if k != "score"
            }
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    with pytest.raises(HfHubHTTPError, match="`stride` is not known here"):
        client.token_classification(TEXTS[0], stride=3)
    with pytest.raises(HfHubHTTPError, match="`top_k` belongs to text classification, and this model labels the token"):
        client.text_classification(TEXTS[0], top_k=1)
