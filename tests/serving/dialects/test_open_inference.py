"""The Open Inference Protocol over HTTP: what each mistake is told. (tests/clients asks as Triton's client does.)"""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import pytest

from tests.serving.conftest import WithEngine
from tpray import errors
from tpray.group.fake_executor import FakeExecutor
from tpray.group.lifecycle import State
from tpray.serving.dialects.open_inference import render_error
from tpray.serving.dialects.open_tensors import from_raw
from tpray.serving.engine import Engine
from tpray.serving.http import make_app

PATH = "/v2/models/m/infer"


def text(**changes: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]} | changes


def ids(**changes: Any) -> dict[str, Any]:
    return {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [[1, 2]]} | changes


MISTAKES: list[tuple[Any, str]] = [
    ({"inputs": []}, "there are no inputs: send text, or input_ids"),
    ({"inputs": [text(), text()]}, "the input `text` is there twice"),
    ({"inputs": [text(shape=[2])]}, "input `text` has 1 elements, and its shape [2] says 2"),
    ({"inputs": [text(shape=[1, 1, 1])]}, "send [rows] or [rows, 1]"),
    ({"inputs": [text(shape=[-1])]}, "sizes are whole numbers from 0"),
    ({"inputs": [text(shape=[1 << 40])]}, "that is too large"),
    ({"inputs": [text(shape=[0], data=[])]}, "the inputs have no rows"),
    ({"inputs": [text(data=[3])]}, "input `text` is BYTES and has 3: send texts"),
    ({"inputs": [text(data=[""])]}, "item 0 is empty"),
    ({"inputs": [text(data=None)]}, "input `text` has no data"),
    ({"inputs": [text(colour=1)]}, "`inputs.0.colour` is not known here"),
    ({"inputs": [text(parameters={"shared_memory_region": "a"})]}, "`shared_memory_region` is not known here"),
    ({"inputs": [text(datatype="FP32")]}, "input `text` is FP32"),
    ({"inputs": [text(name="text_pair")]}, "the input `text_pair` goes with `text`"),
    ({"inputs": [text(), text(name="text_pair", shape=[2], data=["a", "b"])]}, "`text` has 1, `text_pair` has 2"),
    ({"inputs": [ids(shape=[2])]}, "send [rows, tokens]"),
    ({"inputs": [ids(data=[1, 2.5])]}, "has 2.5: send whole numbers"),
    ({"inputs": [ids(data=[1, True])]}, "has True: send whole numbers"),
    ({"inputs": [ids(shape=[2, 2], data=[[1, 2, 3], [4]])]}, "rows that are not of its shape [2, 2]: send 2 of 2 each"),
    ({"inputs": [ids(data=[[1], [2]])]}, "rows that are not of its shape [1, 2]"),
    ({"inputs": [ids(shape=[2, 2], data=[[1, 2], 3, 4])]}, "rows that are not of its shape [2, 2]"),
    ({"inputs": [ids(data=[1, 1 << 70])]}, "has a number that INT64 does not hold"),
    ({"inputs": [ids(data=[1, -1])]}, "item 0 has the token id -1"),
    ({"inputs": [ids(name="text")]}, "the input `text` has another datatype: send BYTES"),
    ({"inputs": [ids(shape=[1, 0], data=[])]}, "item 0 has no tokens"),
    ({"inputs": [ids(shape=[1, 200], data=[1] * 200)]}, "item 0 has 200 tokens and this model takes 128"),
    ({"inputs": [ids(), ids(name="attention_mask", data=[0, 1])]}, "not ones and then zeros: pad at the end"),
    ({"inputs": [ids(), ids(name="token_type_ids", shape=[1, 1], data=[0])]}, "[1, 1] and `input_ids` [1, 2]"),
    ({"inputs": [ids(), ids(name="token_type_ids", data=[0, 9])]}, "item 0 has the token type 9"),
    ({"inputs": [text()], "outputs": [{"name": "logits", "parameters": {"x": 1}}]}, "the parameter `x` is not known"),
    ({"inputs": [text()], "outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]}, "send true or false"),
    (
        {"inputs": [text()], "outputs": [{"name": "logits", "parameters": {"classification": "2"}}]},
        "a number of labels",
    ),
    ({"inputs": [text()], "outputs": [{"name": "logits", "parameters": {"classification": -1}}]}, "1 label or more"),
    ({"inputs": [text()], "parameters": {"timeout": "soon"}}, "send whole microseconds"),
    ({"inputs": [text()], "model": "m"}, "`model` is not known here"),
    ({"inputs": {}}, "`inputs`: input should be a valid array"),
    ([], "the body"),
    (b"{", "the body is not valid JSON"),
    (b" ", "the body is empty"),
]


def test_mistakes_are_named(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://tpray") as http:
            for body, words in MISTAKES:
                answer = await http.post(PATH, content=body if isinstance(body, bytes) else json.dumps(body))
                assert (answer.status_code, list(answer.json())) == (400, ["error"]), body
                assert words in answer.json()["error"]
            assert not executor.steps
            flat, rows = ids(data=[1, 2]), ids()
            said = [(await http.post(PATH, json={"inputs": [each]})).json()["outputs"] for each in (flat, rows)]
            assert said[0] == said[1]
            assert [each["name"] for each in said[0]] == ["logits", "probabilities"]
            many = {"inputs": [text(shape=[9], data=["a"] * 9)]}
            assert (await http.post(PATH, json=many)).status_code == 413

    with_fake_engine(work, max_client_batch_size=8)


def test_binary_data_counts_and_adds_up(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://tpray") as http:

            async def ask(raw: bytes, size: object, header: str | None = None) -> httpx.Response:
                tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
                said = json.dumps({"inputs": [tensor]}).encode()
                headers = {"Inference-Header-Content-Length": header or str(len(said))}
                return await http.post(PATH, content=said + raw, headers=headers)

            good = struct.pack("<I", 3) + b"abc"
            assert (await ask(good, 7)).status_code == 200
            for raw, size, words in (
                (good, 8, "of the binary data 7 bytes are left"),
                (good + b"x", 7, "1 bytes of the binary data are no input's"),
                (good, "7", "send a number of bytes"),
                (good[:6], 6, "ends within an element"),
                (good + good, 14, "has 2 elements, and its shape [1] says 1"),
                (struct.pack("<I", 1) + b"\xff", 5, "item 0 is not UTF-8"),
            ):
                answer = await ask(raw, size)
                assert answer.status_code == 400
                assert words in answer.json()["error"]
            for header in ("x", "9999", "9" * 5000, "-1"):
                assert "Inference-Header-Content-Length is" in (await ask(good, 7, header)).json()["error"]
            assert (await ask(b"x" * 3000, 3000)).status_code == 413

    with_fake_engine(work, payload_limit_bytes=2048)


def test_pages(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://tpray") as http:
            for path, said in (
                ("/v2/health/live", {"live": True}),
                ("/v2/health/ready", {"ready": True}),
                ("/v2/models/org/m/ready", {"name": "org/m", "ready": True}),
            ):
                answer = await http.get(path)
                assert (answer.status_code, answer.json()) == (200, said)
            for path in (PATH, "/v2/models/org/m/versions/1/infer"):
                answer = await http.get(path)
                assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            hold = executor.block("connect")
            executor.die(0)
            await engine.group.lifecycle.until(State.STARTING)
            ready = [await http.get(path) for path in ("/v2/health/ready", "/v2/models/m/ready")]
            assert [answer.status_code for answer in ready] == [503, 503]
            assert ready[0].headers["retry-after"] == "5"
            assert (await http.get("/v2/health/live")).status_code == 200
            hold.set()

    with_fake_engine(work)


def test_other_models_are_not_there(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        transport = httpx.ASGITransport(make_app(engine, served=("org/one", "two")))
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            for name, status in (("org/one", 200), ("two", 200), ("m", 404)):
                answers = [
                    await http.post(f"/v2/models/{name}/infer", json={"inputs": [text()]}),
                    await http.get(f"/v2/models/{name}"),
                    await http.get(f"/v2/models/{name}/versions/1/ready"),
                ]
                assert [answer.status_code for answer in answers] == [status] * 3
            assert answers[0].json() == {"error": "the model `m` does not exist here: ask for `org/one` or `two`"}

    with_fake_engine(work)


def test_raw_numbers_fill_their_shape() -> None:
    assert from_raw("input_ids", "INT32", [1, 2], struct.pack("<ii", 5, 6)).values.tolist() == [[5, 6]]  # type: ignore[union-attr]
    with pytest.raises(errors.InputError, match=r"has 8 bytes, and INT64 of shape \[1, 2\] needs 16"):
        from_raw("input_ids", "INT64", [1, 2], struct.pack("<ii", 5, 6))


@pytest.mark.parametrize(
    ("error", "status"),
    [(errors.InputTooLongError("x"), 400), (errors.UnknownModelError("x"), 404),
     (errors.PayloadTooLargeError("x"), 413), (errors.OverloadedError("x"), 429),
     (errors.RankError("x"), 503), (errors.DeadlineError("x"), 504),
     (errors.StepError("x"), 500), (ZeroDivisionError("secret"), 500)],
)  # fmt: skip
def test_the_table_of_statuses(error: Exception, status: int) -> None:
    found, body, headers, internal, _ = render_error(error)
    assert (found, list(json.loads(body))) == (status, ["error"])
    assert ("retry-after" in headers) == (status in (429, 503))
    assert internal == (type(error) is ZeroDivisionError)
    assert b"secret" not in body
