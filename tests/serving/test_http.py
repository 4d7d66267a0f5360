"""The routes of a replica over fake ranks, without Serve: bodies, statuses, and what the server says of itself."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.serving.conftest import WithEngine
from tpray.group.fake_executor import FakeExecutor
from tpray.group.lifecycle import State
from tpray.serving.dialects.tei_tokens import AT_ONCE
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.haproxy_start import TIMEOUT_HEADER
from tpray.serving.http import make_app
from tpray.serving.metrics import FIGURES
from tpray.serving.tokenizer_threads import TOKENIZER_THREADS


def client(engine: Engine, gate: Gate | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(engine, gate), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://tpray")


def test_forms_of_an_answer(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            single = await http.post("/predict", json={"inputs": ["a", "b"]})
            assert [set(score) for score in single.json()] == [{"score", "label"}] * 2
            assert single.headers["x-compute-tokens"] == "5"
            batch = await http.post("/predict", json={"inputs": [["a"], ["b", "c"]], "raw_scores": True})
            assert [len(item) for item in batch.json()] == [2, 2]

    with_fake_engine(work)


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"inputs": [["a"], [""]]}, 400, "Empty", "`inputs`: item 1 is empty: send some text"),
        (
            {"inputs": "word " * 300, "truncate": False},
            422,
            "Validation",
            "`inputs`: item 0 has 602 tokens and this model takes 128",
        ),
        ({"inputs": [["a"]] * 9}, 413, "Validation", "`inputs` has 9 items and the limit is 8: send smaller batches"),
        ({"inputs": "x" * 3000}, 413, "Validation", "the body is larger than 2048 bytes"),
    ],
)
def test_errors_name_the_item_in_the_dialects_words(
    body: object, status: int, kind: str, words: str, with_fake_engine: WithEngine
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            answer = await http.post("/predict", json=body)
            assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
            assert words in answer.json()["error"]

    with_fake_engine(work, max_client_batch_size=8, payload_limit_bytes=2048)


@pytest.mark.parametrize("auto", [True, False])
def test_the_server_says_whether_texts_are_cut_where_a_request_does_not(
    auto: bool, with_fake_engine: WithEngine
) -> None:
    """As in TEI, whose default it is."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            for truncate, status in ((None, 200 if auto else 422), (True, 200), (False, 422)):
                answer = await http.post("/predict", json={"inputs": "word " * 300, "truncate": truncate})
                assert answer.status_code == status, answer.text
            assert (await http.post("/predict", json={"inputs": "word " * 300})).is_success == auto
            assert (await http.get("/info")).json()["auto_truncate"] == auto

    with_fake_engine(work, **({} if auto else {"auto_truncate": False}))


@pytest.mark.parametrize("value", ["soon", "", "0", "-1", "nan", "1 s"])
def test_a_timeout_that_is_none_is_refused(value: str, with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            answer = await http.post("/predict", json={"inputs": "a"}, headers={TIMEOUT_HEADER: value})
            assert (answer.status_code, answer.json()["error_type"]) == (422, "Validation")
            assert f"the header {TIMEOUT_HEADER} is {value!r}: send a number of seconds" in answer.json()["error"]

    with_fake_engine(work)


@pytest.mark.parametrize(("value", "limit_s"), [("0.5", 60), ("30", 0.5), ("inf", 0.5), (None, 0.5)])
def test_a_client_is_told_in_time_and_the_server_waits_no_longer_than_its_own_limit(
    value: str | None, limit_s: float, with_fake_engine: WithEngine
) -> None:
    """In time is before Serve, whose clock began sooner, cancels the request and answers 408 in words of its own."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        headers = {} if value is None else {TIMEOUT_HEADER: value}
        async with client(engine) as http:
            assert (await http.post("/predict", json={"inputs": "a"}, headers=headers)).status_code == 200
            executor.hang(1)
            began = time.monotonic()
            task = asyncio.ensure_future(http.post("/predict", json={"inputs": "a"}, headers=headers))
            assert task in (await asyncio.wait({task}, timeout=0.5))[0]  # as Serve does
            assert time.monotonic() - began > 0.4
            late = await task
            assert (late.status_code, late.json()["error_type"]) == (504, "Backend")
            assert late.json()["error"] == "the request was not answered within 0.5 s"
            assert engine.queued_tokens == 0

    with_fake_engine(work, request_timeout_s=limit_s)


def test_the_time_to_send_the_body_counts(with_fake_engine: WithEngine) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"inputs": '
        await asyncio.sleep(5)
        yield b'"a"}'

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            began = time.monotonic()
            answer = await http.post("/predict", content=slowly(), headers={TIMEOUT_HEADER: "0.1"})
            assert answer.status_code == 504
            assert time.monotonic() - began < 1

    with_fake_engine(work)


def test_a_group_that_restarts_is_unhealthy_and_says_so(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            for method in ("GET", "HEAD"):
                for path in ("/health", "/ping"):
                    well = await http.request(method, path)
                    assert (well.status_code, well.content) == (200, b"")
            hold = executor.block("connect")
            executor.die(0)
            await engine.group.lifecycle.until(State.STARTING)
            sick = await http.get("/health")
            assert (sick.status_code, sick.json()["error_type"]) == (503, "Unhealthy")
            assert "is restarting: rank 0 died" in sick.json()["error"]
            assert (await http.get("/info")).json()["state"] == "starting"
            hold.set()
            await engine.group.lifecycle.until_ready()
            assert (await http.get("/health")).status_code == 200

    with_fake_engine(work)


def test_what_the_server_says_of_itself(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            info = (await http.get("/info")).json()
            assert (info["tp_degree"], info["state"], info["restarts"]) == (2, "ready", 0)
            names = {"0": "not_paraphrase", "1": "paraphrase"}
            numbers = {"not_paraphrase": 0, "paraphrase": 1}
            assert info["model_type"] == {"classifier": {"id2label": names, "label2id": numbers}}  # in TEI's form
            assert info["chosen"] is None
            assert (info["layout"], info["layout_failure"]) == ("process-per-rank", None)
            assert set(info["metrics"]) == {metric.name for metric in FIGURES}
            assert [phase["phase"] for phase in info["startup"]][:2] == ["resolve", "place"]
            assert len(info["ranks"]) == 2
            assert "/predict" in (await http.get("/openapi.json")).json()["paths"]

    with_fake_engine(work)


def test_every_body_is_documented_with_examples_that_are_answered(with_fake_engine: WithEngine) -> None:
    """Each with 200, or, where the model does not do that, with what the document names; errors have a form."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            paths, found = (await http.get("/openapi.json")).json()["paths"], dict[str, set[int]]()
            for path, methods in paths.items():
                if "post" not in methods:
                    continue
                documented = methods["post"]["responses"]
                for status in ("400", "429", "503"):
                    assert documented[status]["content"]["application/json"]["schema"], (path, status)
                schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
                statuses = set()
                for form in schema.get("anyOf", [schema]):
                    for example in form.get("examples", ()):
                        answer = await http.post(re.sub(r"{\w+}", "mine", path), json=example)
                        statuses.add(answer.status_code)
                        assert str(answer.status_code) in documented
                found[path] = statuses
            own = [path for path in found if not path.startswith("/v2/models/")]  # its examples are in its own test
            assert {path for path in own if 200 not in found[path]} == {"/token_classification"}, found

    with_fake_engine(work)


@pytest.mark.parametrize("digits", [7, 5000])
def test_a_body_that_is_declared_too_large_is_refused_before_it_is_read(
    digits: int, with_fake_engine: WithEngine
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            answer = await http.post("/predict", content=b"{}", headers={"content-length": "9" * digits})
            assert (answer.status_code, answer.json()["error_type"]) == (413, "Validation")
            patient = await http.post("/predict", json={"inputs": "a"}, headers={TIMEOUT_HEADER: "9" * digits})
            assert patient.status_code == 200

    with_fake_engine(work)


def test_a_route_that_is_nobodys_is_an_error_of_the_dialect(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            for path, method, allow in (("/", "DELETE", "GET, HEAD, POST"), ("/predict", "GET", "POST")):
                answer = await http.request(method, path)
                assert (answer.status_code, answer.headers["allow"]) == (405, allow)
            for answer, status in ((await http.get("/absent"), 404), (await http.get("/predict"), 405)):
                assert answer.status_code == status
                assert set(answer.json()) == {"error", "error_type"}

    with_fake_engine(work)


def test_waiting_to_be_tokenised_is_part_of_the_deadline(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            free = threading.Event()
            for _ in range(TOKENIZER_THREADS):
                engine.tokenizing.usual.submit(free.wait)
            late = await http.post("/predict", json={"inputs": "a " * 5000, "truncate": True})
            assert (late.status_code, late.json()["error_type"]) == (504, "Backend")
            assert late.json()["error"] == "the request was not answered within 0.5 s"
            assert (await http.post("/predict", json={"inputs": "a small text"})).status_code == 200
            free.set()
            assert (await http.post("/predict", json={"inputs": "a " * 5000, "truncate": True})).status_code == 200

    with_fake_engine(work, request_timeout_s=0.5)


def test_texts_are_spelled_for_so_many_at_once(with_fake_engine: WithEngine) -> None:
    """More would keep the threads from those whose texts go to the model."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        held = threading.Event()
        for _ in range(TOKENIZER_THREADS):
            engine.tokenizing.usual.submit(held.wait)
        async with client(engine) as http:
            asked = [asyncio.create_task(http.post("/tokenize", json={"inputs": "a"})) for _ in range(AT_ONCE + 3)]
            while sum(each.done() for each in asked) < 3:
                await asyncio.sleep(0.01)
            held.set()
            assert sorted([(await each).status_code for each in asked]) == [200] * AT_ONCE + [429] * 3

    with_fake_engine(work)
