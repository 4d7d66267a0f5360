"""The handlers in front of FastAPI: they answer what its documented routes would, and drop what nobody waits for."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx

from tests.serving.conftest import WithEngine
from tests.serving.test_http import client
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.engine import Engine
from tpray.serving.haproxy_start import TIMEOUT_HEADER
from tpray.serving.http import make_app

KEYS = ("inputs", "raw_scores", "truncate", "truncation_direction", "other", 'in"puts')
ODD = (
    b"", b" ", b"{", b"[]", b"null", b"\xff", b'"\xc3("', b"\xef\xbb\xbf{}", b'{"inputs": NaN}', b'{"inputs": 1e999}',
    b'{"inputs": "a", "inputs": "b c"}', b'{"inputs": "\\ud800"}', b'{"inputs": "\\u0000"}', b'{"inputs": "a"} x',
    b'{"inputs": "a", "truncate": 1}', b'{"inputs": "a", "truncate": "yes"}', b'{"inputs": "a", "raw_scores": 1.5}',
    b'{"inputs": ' + b"9" * 5000 + b"}", b'{"inputs": ' + b"[" * 400 + b"]" * 400 + b"}", b'{"inputs": [["a"], "b"]}',
    b'{"inputs": [["a", "b", "c"]]}', b'{"inputs": [[]]}', b'{"inputs": []}', b'{"inputs": "' + b"x" * 9000 + b'"}',
    b'{"inputs": "' + b"a " * 300 + b'"}', b'{"inputs": "' + b"a " * 300 + b'", "truncate": true}',
    b'{"inputs": "a", "x": [' + b"1," * 4000 + b"1]}",
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say, likely enough what the field wants."""
    text = rng.choice(["a", "a b c", "", " ", "é🙂", "x\0y", "Left", "Right", "true", 'say "so"', "a\\"])
    kinds = [text, text, True, False, None, rng.randrange(-2, 3), 10**30, 0.5, {}]
    lists = [[value(rng, depth + 1) for _ in range(rng.randrange(4))] for _ in range(4)] if depth < 2 else []
    return rng.choice([*kinds, *lists, *lists])


def requests(count: int) -> list[tuple[bytes, dict[str, str]]]:
    """Bodies and headers, valid ones and not."""
    rng, made = random.Random(16), [(body, dict[str, str]()) for body in ODD]
    for _ in range(count):
        body: dict[str, Any] = {"inputs": rng.choice(["a b", ["a", "b"], [["a"], ["b", "c"]], value(rng)])}
        for key in KEYS:
            if rng.random() < 0.25:
                body[key] = value(rng)
        headers = {
            name: rng.choice(said)
            for name, said in ((TIMEOUT_HEADER, ["5", "0", "x"]), ("content-type", ["text/plain", "a; b"]),
                               ("content-encoding", ["identity", "gzip"]))
            if rng.random() < 0.1
        }  # fmt: skip
        encoded = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
        made.append((encoded[: rng.randrange(len(encoded))] if rng.random() < 0.05 else encoded, headers))
    return made


def test_a_handler_answers_as_fastapis_route_does(with_fake_engine: WithEngine) -> None:
    """Status, JSON and headers, but for the times that differ from call to call."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        door = make_app(engine)
        routed = httpx.AsyncClient(
            transport=httpx.ASGITransport(door._app, raise_app_exceptions=False), base_url="http://tpray"
        )
        seen = set()
        async with routed, client(engine) as straight:
            for body, headers in requests(300):
                ways = [await http.post("/predict", content=body, headers=headers) for http in (straight, routed)]
                one, other = ways
                assert (one.status_code, one.json()) == (other.status_code, other.json()), body
                assert set(one.headers) == set(other.headers)
                assert one.headers["content-type"] == other.headers["content-type"]
                seen.add(one.status_code)
            assert seen == {200, 400, 413, 422}
            for method, path in (("GET", "/predict"), ("HEAD", "/predict"), ("PUT", "/predict"), ("POST", "/absent/")):
                one, other = [await http.request(method, path) for http in (straight, routed)]
                assert (one.status_code, one.text) == (other.status_code, other.text)

    with_fake_engine(work, payload_limit_bytes=16_384, max_client_batch_size=4)


def test_fastapi_is_not_asked_for_what_has_a_handler(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        door, asked = make_app(engine), []
        app = door._app

        async def recorder(scope: Any, receive: Any, send: Any) -> None:
            asked.append(scope["path"])
            await app(scope, receive, send)

        door._app = recorder  # type: ignore[assignment]
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            for path in app.openapi()["paths"]:
                methods = app.openapi()["paths"][path]
                for method in methods:
                    await http.request(method.upper(), path, json={"inputs": "a"})
        assert "/predict" not in asked
        assert "/info" in asked

    with_fake_engine(work)


def test_a_slash_at_the_end_is_no_other_path(with_fake_engine: WithEngine) -> None:
    """A redirect would lose the body of a client that does not send it again."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            for path in ("/predict/", "/predict//"):
                assert (await http.post(path, json={"inputs": "a"})).status_code == 200

    with_fake_engine(work)


def test_serve_finds_the_name_of_a_route(with_fake_engine: WithEngine) -> None:
    from ray.serve._private.thirdparty import get_asgi_route_name as module

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        door: Any = make_app(engine)
        for method, path in (("POST", "/predict"), ("GET", "/info"), ("GET", "/health")):
            scope = {"type": "http", "method": method, "path": path, "headers": []}
            assert module.get_asgi_route_name(door, scope) == path
        assert "/predict" in {pattern.path for pattern in module.extract_route_patterns(door)}

    with_fake_engine(work)


def test_rows_of_a_client_that_left_are_dropped(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        door, left, sent = make_app(engine), asyncio.Event(), list[Any]()
        messages = [{"type": "http.request", "body": b'{"inputs": "a b"}', "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        executor.hang(1)
        stuck = []
        for _ in range(engine.config.steps_in_flight):  # each a step of its own
            stuck.append(asyncio.ensure_future(engine.classify(["a"])))
            await asyncio.sleep(0.02)
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        asking = asyncio.ensure_future(door(scope, receive, send))
        await asyncio.sleep(0.15)
        assert engine.queued_tokens > 0
        left.set()
        await asyncio.wait_for(asking, 2)
        assert engine.queued_tokens == 0
        assert sent[0]["status"] == 499
        for one in stuck:
            one.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    with_fake_engine(work)


def test_an_application_below_a_prefix_answers_each_route(with_fake_engine: WithEngine) -> None:
    """As Serve asks it, with the prefix in ``path`` and in ``root_path``."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        below = httpx.ASGITransport(make_app(engine), root_path="/a")
        documents = {"query": "a", "documents": ["b"]}
        async with httpx.AsyncClient(transport=below, base_url="http://tpray/a") as http:
            for path, body in (
                ("/predict", {"inputs": "a"}),
                ("/models/m", {"inputs": "a"}),
                ("/v1/rerank", documents),
                ("/v2/rerank", documents),
                ("/v1/score", {"queries": "a", "documents": ["b"]}),
            ):
                answer = await http.post(path, json=body)
                assert answer.status_code == 200, (path, answer.text)
            assert (await http.get("/info")).status_code == 200

    with_fake_engine(work)
