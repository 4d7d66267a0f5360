"""vLLM's and Infinity's dialects: scores of stock transformers, forms of requests and answers, mistakes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.serving.dialects.asked import ask
from tests.serving.test_chat import CHATML, save

TEXTS = ["the firm is in Paris", "good morning to the train and the firm and the town", "hello"]
TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the firm"}]


@pytest.fixture(scope="module")
def directory(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("vllm") / "m"
    template = CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    save(make_checkpoint("bert", vocab_size=124), target, template, ["<|im_start|>", "<|im_end|>"])
    return target


class Stock:
    """transformers' own tokenizer and model."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(directory).eval()

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(self.model(torch.tensor([ids])).logits[0])

    def probs(self, ids: list[int]) -> np.ndarray:
        return np.asarray(torch.tensor(self.logits(ids)).softmax(0))

    def ids(self, text: str, side: str = "right", **how: Any) -> list[int]:
        self.tokenizer.truncation_side = side
        return list(self.tokenizer(text, **how)["input_ids"])


def test_classify_gives_what_transformers_gives(directory: Path) -> None:
    stock = Stock(directory)
    ids = [stock.ids(text) for text in TEXTS]

    async def work(http: httpx.AsyncClient) -> None:
        async def probs(**body: Any) -> list[list[float]]:
            answer = await http.post("/classify", json=body)
            assert answer.status_code == 200, answer.text
            return [item["probs"] for item in answer.json()["data"]]

        async def same(expected: list[np.ndarray], **body: Any) -> None:
            np.testing.assert_allclose(await probs(**body), expected, atol=1e-5, err_msg=str(body))

        every = [stock.probs(row) for row in ids]
        await same(every, input=TEXTS)
        await same(every[:1], input=TEXTS[0])
        await same(every, input=ids)
        await same(every[:1], input=ids[0])
        await same([stock.logits(row) for row in ids], input=TEXTS, use_activation=False)
        await same([stock.logits(ids[0])], input=ids[0], activation=False)
        bare = stock.ids(TEXTS[1], add_special_tokens=False)
        await same([stock.probs(bare)], input=TEXTS[1], add_special_tokens=False)
        for side in ("right", "left"):
            cut = stock.ids(TEXTS[1], side, truncation=True, max_length=6)
            await same([stock.probs(cut)], input=TEXTS[1], truncate_prompt_tokens=6, truncation_side=side)
        await same([stock.probs(ids[1][:6])], input=ids[1], truncate_prompt_tokens=6)
        await same([stock.probs(ids[1][-6:])], input=ids[1], truncate_prompt_tokens=6, truncation_side="left")
        long = " ".join(TEXTS * 20)
        most = stock.ids(long, truncation=True, max_length=stock.model.config.max_position_embeddings)
        await same([stock.probs(most)], input=long, truncate_prompt_tokens=-1)
        for prompt in (False, True):
            made = stock.tokenizer.apply_chat_template(TALK, add_generation_prompt=prompt, return_dict=False)
            await same([stock.probs(made)], messages=TALK, add_generation_prompt=prompt)

    ask(directory, work)


def test_the_form_of_answers(directory: Path) -> None:
    stock = Stock(directory)
    ids = [stock.ids(text) for text in TEXTS]

    async def work(http: httpx.AsyncClient) -> None:
        body = {"input": TEXTS, "model": "mine", "request_id": "7", "user": "u", "priority": 0}
        answer = (await http.post("/classify", json=body)).json()
        assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
        assert (answer["id"], answer["object"], answer["model"]) == ("classify-7", "list", "mine")
        tokens = sum(map(len, ids))
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        for number, item in enumerate(answer["data"]):
            best = int(np.argmax(item["probs"]))
            assert {**item, "probs": None} == {
                "index": number, "label": f"LABEL_{best}", "probs": None, "num_classes": 3
            }  # fmt: skip
        pooled = (await http.post("/pooling", json=body | {"task": "classify", "encoding_format": "float"})).json()
        assert [item["data"] for item in pooled["data"]] == [item["probs"] for item in answer["data"]]
        assert {item["object"] for item in pooled["data"]} == {"pooling"}
        packed = (await http.post("/pooling", json={"input": TEXTS[0], "encoding_format": "base64"})).json()
        values = np.frombuffer(base64.b64decode(packed["data"][0]["data"]), "<f4")
        np.testing.assert_allclose(values, answer["data"][0]["probs"], atol=1e-6)
        nothing = dict.fromkeys(
            ("model", "user", "truncate_prompt_tokens", "truncation_side", "use_activation", "activation", "request_id",
             "priority", "messages", "add_special_tokens", "add_generation_prompt", "continue_final_message", "other")
        )  # fmt: skip
        again = await http.post("/classify", json={"input": TEXTS} | nothing)
        assert again.json()["data"] == answer["data"], "null is what is left out"
        models = (await http.get("/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["mine", "also"]
        assert models["data"][0]["max_model_len"] == 80

    ask(directory, work, "mine", "also")


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, None, "`input` is missing: send a text, a list of texts, token ids"),
    ({"input": None}, 400, None, "`input` is missing"),
    ({"input": []}, 400, None, "there is nothing to classify: send at least one"),
    ({"input": [[]]}, 400, "input", "`input`: item 0 is empty: send at least one token id"),
    ({"input": ""}, 400, "input", "`input`: item 0 is empty: send some text"),
    ({"input": ["a", " "]}, 400, "input", "`input`: item 1 is empty"),
    ({"input": 3}, 400, "input", "`input` has the wrong type: send a text"),
    ({"input": [1.0, 2.0]}, 400, "input", "`input` has the wrong type"),
    ({"input": [True]}, 400, "input", "`input` has the wrong type"),
    ({"input": ["a", 1]}, 400, "input", "`input` has the wrong type"),
    ({"input": [[1], ["a"]]}, 400, "input", "`input` has the wrong type"),
    (
        {"input": [1, -1]},
        400,
        "input",
        "item 0 has the token id -1 at position 1, and this model knows those from 0 to",
    ),
    ({"input": [[1], [10**30]]}, 400, "input", "item 1 has the token id 100000000000000000000000 at position 0"),
    ({"input": [1] * 81}, 400, "input", "has 81 tokens and this model takes 80: shorten it, or set `truncate_prompt_t"),
    ({"input": "a " * 99}, 400, "input", "set `truncate_prompt_tokens` to -1"),
    ({"input": "a", "messages": TALK}, 400, None, "`input` and `messages` exclude each other"),
    ({"messages": []}, 400, None, "`messages` is a conversation without messages"),
    ({"messages": [{"content": "x"}]}, 400, None, "`messages` has a message 0 without a role"),
    ({"messages": TALK * 40}, 400, None, "`messages` has "),
    ({"messages": [{"role": "user"}]}, 400, None, "`messages` is refused by the model's chat template"),
    ({"messages": "x"}, 400, "messages", "`messages`: input should be a valid array"),
    ({"messages": TALK, "add_special_tokens": True}, 400, None, "the chat template writes those of `messages` itself"),
    ({"input": "a", "add_generation_prompt": True}, 400, None, "`add_generation_prompt` goes with `messages`"),
    (
        {"input": "a", "truncate_prompt_tokens": 0},
        400,
        None,
        "`truncate_prompt_tokens` is 0, and this model takes 1 to",
    ),
    ({"input": "a", "truncate_prompt_tokens": 81}, 400, None, "is 81, and this model takes 1 to 80"),
    ({"input": "a", "truncate_prompt_tokens": 10**30}, 400, None, "and this model takes 1 to 80"),
    ({"input": "a", "truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens", "greater than or equal to -1"),
    ({"input": "a", "truncate_prompt_tokens": 2.5}, 400, "truncate_prompt_tokens", "valid integer"),
    ({"input": "a", "truncate_prompt_tokens": True}, 400, "truncate_prompt_tokens", "valid integer"),
    ({"input": "a b", "truncate_prompt_tokens": 2}, 400, "input", "is to be cut to 2 tokens, and 2 are special ones"),
    ({"input": "a", "truncation_side": "up"}, 400, "truncation_side", "'left' or 'right'"),
    ({"input": "a", "use_activation": "no"}, 400, "use_activation", "valid boolean"),
    ({"input": "a", "use_activation": True, "activation": False}, 400, None, "they differ: give one of them"),
    ({"input": "a", "priority": 3}, 400, "priority", "should be 0"),
    ({"input": "a", "threshold": 0.5}, 400, None, "`threshold` is not known here: leave it out; there are model, user"),
    ({"input": "a", "chat_template": "{{ 1 }}"}, 400, None, "`chat_template` is not known here"),
    ({"input": ["a"] * 5}, 413, None, "`input` has 5 items and the limit is 4"),
    ({"input": "a", "model": "other"}, 404, "model", "the model `other` does not exist here: ask for `mine`"),
]


def test_mistakes_are_told_in_openais_form(directory: Path) -> None:
    types = {400: "BadRequestError", 413: "BadRequestError", 404: "NotFoundError"}

    async def work(http: httpx.AsyncClient) -> None:
        for path in ("/classify", "/pooling"):
            for body, status, param, words in WRONG:
                answer = await http.post(path, json=body)
                assert answer.status_code == status, (body, answer.text)
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert (error["type"], error["param"], error["code"]) == (types[status], param, status), body
                assert words in error["message"], (body, error)
        for body, words in (
            ({"input": "a", "task": "embed"}, "`task`: input should be 'classify'"),
            ({"input": "a", "encoding_format": "bytes"}, "`encoding_format`: input should be 'float' or 'base64'"),
            ({"input": "a", "dimensions": 3}, "`dimensions` is not known here"),
        ):
            answer = await http.post("/pooling", json=body)
            assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text
        for content, words in (
            (b"{", "is not valid JSON"),
            (b"", "the body is empty"),
            (b"[]", "must be a JSON object"),
        ):
            answer = await http.post("/classify", content=content)
            assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text

    ask(directory, work, "mine", max_client_batch_size=4)


def test_a_body_with_raw_scores_is_infinitys(directory: Path) -> None:
    stock = Stock(directory)

    async def work(http: httpx.AsyncClient) -> None:
        long = [*TEXTS, " ".join(TEXTS * 20)]
        rows = [stock.ids(text, truncation=True, max_length=80) for text in long]
        for raw in (False, True):
            body = {"input": long, "model": "default/not-specified", "raw_scores": raw}
            answer = (await http.post("/classify", json=body)).json()
            assert set(answer) == {"object", "data", "model", "usage", "id", "created"}
            assert (answer["object"], answer["model"]) == ("classify", "mine")
            assert answer["usage"]["total_tokens"] == sum(map(len, rows))
            for row, scores in zip(rows, answer["data"], strict=True):
                assert [set(score) for score in scores] == [{"score", "label"}] * 3
                assert scores == sorted(scores, key=lambda score: -score["score"])
                expected = stock.logits(row) if raw else stock.probs(row)
                found = [score["score"] for score in sorted(scores, key=lambda score: score["label"])]
                np.testing.assert_allclose(found, expected, atol=1e-5)
        for wrong, status, words in (
            ({"input": ["a", ""]}, 400, "`input`: item 1 is empty"),
            ({"input": "a"}, 400, "`input`: input should be a valid array"),
            ({"input": []}, 400, "there is nothing to classify"),
            (
                {"input": ["a"], "user": "x"},
                400,
                "`user` is not known here: leave it out; there are input, model",
            ),
            ({"input": ["a"], "model": "other"}, 404, "the model `other` does not exist here"),
        ):
            answer = await http.post("/classify", json={"raw_scores": None, **wrong})
            assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
        plain = (await http.post("/infinity/classify", json={"input": long})).json()
        assert [len(scores) for scores in plain["data"]] == [3] * 4, "with the prefix no key is needed"
        models = (await http.get("/models")).json()
        assert models == (await http.get("/infinity/models")).json()
        assert [(model["id"], model["object"]) for model in models["data"]] == [("mine", "model")]
        assert models["data"][0]["capabilities"] == ["classify"]

    ask(directory, work, "mine")


def test_score_gives_what_cross_encoder_gives(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    directory = make_checkpoint("bert", num_labels=1, num_hidden_layers=1)
    stock = CrossEncoder(str(directory), device="cpu", model_kwargs={"dtype": "float32"})
    queries, documents = ["where is the firm", "hello", "where is the firm"], TEXTS

    async def work(http: httpx.AsyncClient) -> None:
        async def scores(path: str = "/score", **body: Any) -> list[float]:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert [(each["index"], each["object"]) for each in answer.json()["data"]] == [
                (n, "score") for n in range(len(answer.json()["data"]))
            ]
            assert answer.json()["usage"]["total_tokens"] > 0
            return [each["score"] for each in answer.json()["data"]]

        each = stock.predict(list(zip(queries, documents, strict=True)))
        one = stock.predict([(queries[0], document) for document in documents])
        raw = stock.predict([(queries[0], d) for d in documents], activation_fn=torch.nn.Identity())
        for first, second in (
            ("queries", "documents"),
            ("text_1", "text_2"),
            ("queries", "items"),
            ("data_1", "data_2"),
        ):
            named: dict[str, Any] = {first: queries, second: documents}
            np.testing.assert_allclose(await scores(**named), each, atol=1e-5)
        np.testing.assert_allclose(await scores("/v1/score", text_1=queries[0], text_2=documents), one, atol=1e-5)
        np.testing.assert_allclose(await scores(text_1=queries[:1], text_2=documents), one, atol=1e-5)
        np.testing.assert_allclose(await scores(text_1=queries[0], text_2=documents[0]), one[:1], atol=1e-5)
        found = await scores(queries=queries[0], documents=documents, use_activation=False)
        np.testing.assert_allclose(found, raw, atol=1e-4)
        words = " ".join(documents[1].split()[:3])
        few = stock.predict([(queries[0], words)])
        count = len(stock.tokenizer(words, add_special_tokens=False)["input_ids"])
        cut = await scores(queries=queries[0], documents=documents[1], max_tokens_per_doc=count)
        np.testing.assert_allclose(cut, few, atol=1e-5)
        most = len(stock.tokenizer(queries[0], words)["input_ids"])
        cut = await scores(queries=queries[0], documents=documents[1], truncate_prompt_tokens=most)
        np.testing.assert_allclose(cut, few, atol=1e-5)
        order = np.argsort([-value for value in one])
        body = {"query": queries[0], "documents": documents, "return_documents": True}
        found = (await http.post("/infinity/rerank", json=body)).json()
        assert (found["object"], set(found)) == (
            "rerank", {"object", "results", "model", "usage", "id", "created"}
        )  # fmt: skip
        assert [each["document"] for each in found["results"]] == [documents[number] for number in order]
        assert [each["index"] for each in found["results"]] == list(order)
        for logits in ({"raw_scores": True}, {"use_activation": False}):
            results = (await http.post("/rerank", json=body | logits)).json()["results"]
            np.testing.assert_allclose([each["relevance_score"] for each in results], raw[order], atol=1e-4)
        refused: list[tuple[dict[str, Any], str]] = [
            ({"raw_scores": True, "use_activation": True}, "`raw_scores` asks for logits, and `use_activation` for"),
            ({"truncation": False, "truncate_prompt_tokens": 9}, "`truncation` is false, and `truncate_prompt_tokens`"),
            ({"truncation": False, "documents": ["b " * 99]}, "`documents`: item 0 has"),
            ({"rank_fields": ["x"]}, "`rank_fields` is not known"),
        ]
        for more, said in refused:
            answer = await http.post("/infinity/rerank", json=body | more)
            assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
        wrong: list[tuple[dict[str, Any], int, str]] = [
            ({}, 400, "there is nothing to score: send `queries` and `documents`, or `text_1` and `text_2`"),
            ({"queries": "a"}, 400, "`queries` is there alone: send"),
            ({"queries": "a", "text_2": "b"}, 400, "`queries` and `text_2` do not go together"),
            ({"queries": "a", "documents": []}, 400, "there are no documents to score"),
            ({"queries": [], "documents": "b"}, 400, "there are no queries to score"),
            (
                {"queries": ["a"] * 3, "documents": ["b"] * 2},
                400,
                "there are 3 queries and 2 documents: send one",
            ),
            ({"queries": ["a", "b"], "documents": "b"}, 400, "there are 2 queries and 1 documents"),
            ({"text_1": ["a", "a"], "text_2": ["b", ""]}, 400, "`text_2`: item 1 is empty"),
            ({"queries": ["a", ""], "documents": ["b", "b"]}, 400, "pair 1: the query is empty"),
            ({"queries": "", "documents": ["b", "b"]}, 400, "the query is empty"),
            ({"queries": "a", "documents": "b " * 99}, 400, "`documents`: item 0 has"),
            ({"queries": "a", "documents": ["b"] * 41}, 413, "there are 41 pairs and the limit is 40"),
            ({"queries": "a", "documents": "b", "max_tokens_per_query": 3}, 400, "`max_tokens_per_query` is not known"),
            ({"queries": "a", "documents": [{"text": "b"}]}, 400, "`documents`: input should be a valid string"),
        ]
        for body, status, said in wrong:
            answer = await http.post("/score", json=body)
            assert answer.status_code == status, answer.text
            assert said in answer.json()["error"]["message"], answer.text

    ask(directory, work, max_concurrent_requests=40)


def test_a_model_with_three_labels_has_no_scores_of_pairs(directory: Path) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        answer = await http.post("/score", json={"queries": ["a", "b"], "documents": ["b", "c"]})
        assert answer.status_code == 400
        assert "has 3 labels (LABEL_0, LABEL_1, LABEL_2), and reranking takes" in answer.json()["error"]["message"]
        assert "pair" not in answer.json()["error"]["message"]

    ask(directory, work)
