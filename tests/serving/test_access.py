"""Who gets past the door: with a key, without one where that is declared, and from pages of other origins."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
from pydantic import ValidationError

from tests.serving.conftest import WithEngine
from tpray.config import AccessConfig, ModelsConfig
from tpray.errors import ConfigError, RateLimitError, UnauthorizedError
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.access import OPEN, Access, check_host, on_loopback
from tpray.serving.dialects import DIALECTS, tei
from tpray.serving.dialects.base import Answering, Rendered
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.http import make_app
from tpray.serving.keys import KeyRing, parse
from tpray.serving.model_router import Asked, ModelRouter

KEY = "alice-0123456789"
BEARER = {"authorization": f"Bearer {KEY}"}
PAGE = "https://app.example.com"


def access(limits: str = "", **config: Any) -> Access:
    return Access(AccessConfig(**config), KeyRing(parse([f"alice: {KEY} {limits}"], "test")))


def client(engine: Engine, who: Access) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(engine, access=who), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://tpray")


async def ask(app: Any, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """An answer to a path as it is, which a client may have made ready; uvicorn decodes it like this."""
    sent: list[Any] = []

    arrived = iter([{"type": "http.request", "body": b'{"inputs": "a"}', "more_body": False}])

    async def receive() -> Any:
        for message in arrived:
            return message
        await asyncio.Event().wait()  # nobody leaves

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "query_string": b"",
        "method": method, "path": unquote(path), "raw_path": path.encode(), "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    await app(scope, receive, send)
    start, *parts = sent
    said = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], said, b"".join(part.get("body", b"") for part in parts)


def paths_of(routes: Any) -> Iterator[str]:
    """FastAPI keeps a router that is included as it is."""
    for route in routes:
        if hasattr(route, "path"):
            yield route.path
        else:
            yield from paths_of(route.original_router.routes)


def every_path(app: Any) -> list[str]:
    """Of every route, with something in the place of what varies, and paths that are no route."""
    known = set(paths_of(app.routes)) | set(itertools.chain(*OPEN.values()))
    named = {path.replace("{", "").replace("}", "").replace(":path", "") for path in known}
    return sorted(named | {"", "/no/such/route", "/-/routes", "/v1", "/v2/models/m/infer", "/admin", "/.env", "//"})


def variants(path: str) -> Iterator[str]:
    """Ways to write a path with which something in front of a router may be misled."""
    yield from (path, path + "/", path.rstrip("/"), "/" + path, path.upper(), path.title(), path + "//", path + "?deep")
    yield from (path + end for end in ("%00", ";x", "#", "%20", "/.", "/..", "%2f", ".json"))
    yield from (quote(path, safe=""), "".join(f"%{ord(c):02x}" for c in path), path.replace("/", "//"))
    for opened in ("/health", "/docs/assets", "/page", "/docs", ""):
        yield from (f"{opened}{between}{path}" for between in ("", "/", "/..", "/.", "/%2e%2e", "\\..", "/x/../.."))
        yield from (f"{opened}/..%2f{path[1:]}", f"{path}/..{opened}")


METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get", "QUERY")
DECLARED = {"/health", "/ping", "/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json"}
DECLARED |= {f"{path}/" for path in DECLARED - {"/"}}


@pytest.mark.parametrize(
    "config", [{}, {"open_routes": ()}, {"cors_origins": (PAGE,)}], ids=["default", "none", "cors"]
)
def test_nothing_is_answered_without_a_key_but_what_is_declared_open(
    config: dict[str, Any], with_fake_engine: WithEngine
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine, access=access(**config))
        tried, opened, rng = 0, set(), random.Random(18)
        for path in every_path(app):
            others = rng.sample(list(dict.fromkeys(variants(path))), 9)
            for written, method in (*((path, each) for each in METHODS), *itertools.product(others, ("GET", "POST"))):
                status, headers, _ = await ask(app, method, written)
                tried += 1
                if status != 401:
                    opened.add(unquote(written))
                    assert method in ("GET", "HEAD"), (method, written, status)
                else:
                    assert headers["www-authenticate"] == "Bearer"
        assert tried > 500
        if config == {"open_routes": ()}:
            assert not opened
        else:
            below = {path for path in opened if path.startswith(("/docs/assets/", "/page/"))}
            assert all(".." not in path for path in below)
            assert opened - below <= DECLARED, opened - below - DECLARED
            assert opened >= {"/health", "/docs", "/openapi.json"}
        assert {"/predict", "/info", "/v2/rerank", "/docs", "/health"} <= set(every_path(app))

    with_fake_engine(work)


def test_paths_made_up_at_random_are_not_answered_without_a_key(with_fake_engine: WithEngine) -> None:
    pieces = ["/", "//", "..", ".", "%2e", "%2f", "health", "docs", "assets", "page", "predict", "info", "v2", "models",
              "rerank", "%00", ";", "\\", "openapi.json", "HEALTH", "?", "%252e", "\u00e9", "a.css"]  # fmt: skip

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app, rng = make_app(engine, access=access()), random.Random(18)
        for _ in range(3000):
            path = "/" * rng.randrange(2) + "".join(rng.choices(pieces, k=rng.randrange(1, 7)))
            method = rng.choice(METHODS)
            status, _, body = await ask(app, method, quote(path, safe="/%?;.\\"))
            known = unquote(path.replace("\\", "\\"))
            inside = known in DECLARED or known.startswith(("/docs/assets/", "/page/"))
            assert status == 401 or (inside and method in ("GET", "HEAD")), (method, path, status, body)
            assert b"model_id" not in body

    with_fake_engine(work)


def test_a_path_below_a_prefix_of_the_application_is_the_same_path() -> None:
    """As Serve mounts one of several applications."""
    who = access()
    opened = {"/wide/health", "/health", "/wide/docs/assets/a.js"}
    for path in (*opened, "/wide/info", "/wide", "/widehealth", "/wide/docs/assets/../a", "/wide/wide/health"):
        assert who.is_open({"method": "GET", "path": path, "root_path": "/wide"}) is (path in opened), path


def test_a_websocket_is_closed_without_a_key(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine, access=access())
        for path in ("/health", "/info", "/predict", "/"):
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            async def receive() -> Any:
                return {"type": "websocket.connect"}

            scope: dict[str, Any] = {"type": "websocket", "path": path, "raw_path": path.encode(), "root_path": ""}
            scope |= {"headers": [], "query_string": b"", "scheme": "ws", "subprotocols": []}
            await app(scope, receive, send)
            assert [message["type"] for message in sent] == ["websocket.close"]

    with_fake_engine(work)


def test_with_a_key_all_is_answered_and_it_is_noted_whose_it_is(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        who = access()
        async with client(engine, who) as http:
            for method, path in (("POST", "/predict"), ("GET", "/info"), ("GET", "/health"), ("GET", "/docs")):
                answer = await http.request(method, path, json={"inputs": "a b c"}, headers=BEARER)
                assert answer.status_code == 200, path
                if path == "/info":
                    assert answer.json()["key"] == {"name": "alice", "requests": 2, "refused": 0, "tokens": 5}
            assert (await http.post("/nowhere", headers=BEARER)).status_code == 404
        used = who.keys.usage()["alice"]
        assert (used.requests, used.tokens) == (3, 5), "what is open is not counted"
        shown = [(b"authorization", BEARER["authorization"].encode())]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/predict", "headers": shown}
        who.check(scope)
        assert scope["state"] == {"key": "alice"}

    with_fake_engine(work)


def test_a_key_is_shown_once_and_as_it_is(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, access()) as http:
            twice: list[list[tuple[str, str]]] = [
                [("authorization", "Bearer other-0123456789"), ("authorization", BEARER["authorization"])],
                [("authorization", BEARER["authorization"])] * 2,
                [("x-api-key", KEY)],
                [("proxy-authorization", BEARER["authorization"])],
                [("cookie", f"authorization=Bearer {KEY}")],
                [("authorization", f"Bearer {KEY}, Bearer {KEY}")],
            ]
            for headers in twice:
                answer = await http.post("/predict", json={"inputs": "a"}, headers=headers)
                assert answer.status_code == 401, headers
                assert KEY not in answer.text

    with_fake_engine(work)


def test_every_dialect_refuses_in_its_own_form(with_fake_engine: WithEngine) -> None:
    error = UnauthorizedError("this server asks for a key: send the header Authorization: Bearer KEY")

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, access()) as http:
            for dialect in DIALECTS:
                for path in dialect.handlers(Answering(engine)):
                    answer = await http.post(path, content=b"not read")
                    assert answer.status_code == 401
                    assert answer.content == dialect.render_error(error).body
                    assert str(error) in answer.text
            assert (await http.post("/v2/rerank")).json() == {"message": str(error)}
            assert (await http.post("/predict")).json() == {"error": str(error), "error_type": "Unauthorized"}
            assert (await http.get("/no/such/route")).json()["error"] == str(error)

    with_fake_engine(work)


def test_a_limit_is_named_and_says_when_to_come_back(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, access("requests=2/min tokens=9/min", cors_origins=(PAGE,))) as http:
            body, headers = {"inputs": ["a b", "c d"]}, BEARER | {"origin": PAGE}
            assert (await http.post("/predict", json=body, headers=headers)).status_code == 200
            assert (await http.post("/predict", json=body, headers=headers)).status_code == 200  # from 2 tokens to -5
            for path, name in (("/predict", "error"), ("/v1/rerank", "message")):
                refused = await http.post(path, json=body, headers=headers)
                assert refused.status_code == 429
                assert "the key 'alice' has used its 2 requests a minute" in refused.json()[name]
                assert 0 < int(refused.headers["retry-after"]) <= 30
                assert refused.headers["access-control-allow-origin"] == PAGE
            assert (await http.get("/health", headers=headers)).status_code == 200

    with_fake_engine(work)


def test_tokens_are_charged_as_soon_as_they_are_known(with_fake_engine: WithEngine) -> None:
    """And not when the answer comes: many requests at once would each find nothing used."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        who = access("tokens=10/min")
        executor.delay(1, 0.3)
        async with client(engine, who) as http:
            slow = asyncio.create_task(http.post("/predict", json={"inputs": "word " * 20}, headers=BEARER))
            await asyncio.sleep(0.1)
            assert not slow.done()
            assert who.keys.usage()["alice"].tokens > 10
            refused = await http.post("/predict", json={"inputs": "a"}, headers=BEARER)
            assert (refused.status_code, (await slow).status_code) == (429, 200)
            assert "10 tokens a minute" in refused.json()["error"]

    with_fake_engine(work)


def test_the_openapi_document_says_that_a_key_is_asked_for(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        for who, said in ((access(), [{"key": []}]), (Access(), None)):
            async with client(engine, who) as http:
                found = (await http.get("/openapi.json")).json()
                assert found.get("security") == said
                schemes = found["components"].get("securitySchemes")
                assert schemes == ({"key": {"type": "http", "scheme": "bearer"}} if said else None)

    with_fake_engine(work)


def test_a_page_of_another_origin_may_ask_with_a_key(with_fake_engine: WithEngine) -> None:
    preflight = {"origin": PAGE, "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization,content-type"}  # fmt: skip

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, access(cors_origins=(PAGE, "http://localhost:3000"))) as http:
            asked = await http.options("/predict", headers=preflight)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == PAGE
            assert set(asked.headers["access-control-allow-headers"].split(",")) >= {"authorization", "content-type"}
            assert "POST" in asked.headers["access-control-allow-methods"]
            assert "model" not in asked.text
            for headers, status in ((BEARER, 200), ({}, 401), ({"authorization": "Bearer wrong-0123456789"}, 401)):
                answer = await http.post("/predict", json={"inputs": "a"}, headers=headers | {"origin": PAGE})
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == PAGE
                exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
                assert exposed >= {"x-compute-tokens", "x-queue-time", "retry-after"}
            for status, path in ((404, "/no/such/route"), (422, "/predict")):
                answer = await http.post(path, json={"inputs": 1}, headers=BEARER | {"origin": PAGE})
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == PAGE
            other = await http.post(
                "/predict", json={"inputs": "a"}, headers=BEARER | {"origin": "https://evil.example"}
            )
            assert "access-control-allow-origin" not in other.headers
            assert (
                await http.options("/predict", headers=preflight | {"origin": "https://evil.example"})
            ).status_code == 400
        async with client(engine, access()) as http:
            assert (await http.options("/predict", headers=preflight)).status_code == 401
            plain = await http.post("/predict", json={"inputs": "a"}, headers=BEARER | {"origin": PAGE})
            assert not [name for name in plain.headers if name.startswith("access-control")]

    with_fake_engine(work)


@pytest.mark.parametrize(
    "origin", ["example.com", "https://example.com/", "https://a.example,https://b.example", "HTTPS://A"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin: give scheme, host and port only"):
        AccessConfig(cors_origins=(origin,))


def test_the_gate_is_asked_first(with_fake_engine: WithEngine) -> None:
    """Who is at the wrong server is told so, whatever his key; one that stops tells only those with a key."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        gate = Gate("ours")
        transport = httpx.ASGITransport(make_app(engine, gate, access=access()))
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            assert (await http.get("/info", headers=BEARER)).status_code == 421
            ours = {"x-tpray-server": "ours"}
            assert (await http.get("/info", headers=ours)).status_code == 401
            assert (await http.get("/info", headers=ours | BEARER)).status_code == 200
            await gate.close(0.1)
            assert (await http.get("/info", headers=ours)).status_code == 401
            assert (await http.get("/info", headers=ours | BEARER)).status_code == 503

    with_fake_engine(work)


def test_a_call_over_grpc_is_let_in_by_its_metadata() -> None:
    who = access("requests=1/min")
    for shown in (None, b"", b"Bearer x", KEY.encode()):
        with pytest.raises(UnauthorizedError):
            who.admit(shown)
    caller = who.admit(f"bearer {KEY}".encode())
    assert caller is not None
    assert caller.name == "alice"
    with pytest.raises(RateLimitError):
        who.admit(f"Bearer {KEY}".encode())
    assert Access().admit(None) is None


def test_others_on_the_network_are_let_in_only_with_a_key_or_when_that_is_said() -> None:
    none, some = KeyRing(), KeyRing(parse([f"alice: {KEY}"], "test"))
    for host, loopback in (("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.8.8", True),
                           ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("no-such-host.invalid", False),
                           ("", False), ("169.254.1.1", False), ("::ffff:10.0.0.1", False)):  # fmt: skip
        assert on_loopback(host) is loopback, host
        check_host(host, AccessConfig(), some, "--host", "do this")
        check_host(host, AccessConfig(insecure_no_key=True), none, "--host", "do this")
        if loopback:
            check_host(host, AccessConfig(), none, "--host", "do this")
        else:
            with pytest.raises(ConfigError, match="lets others on the network ask, and there is no key: do this"):
                check_host(host, AccessConfig(), none, "--host", "do this")


def test_in_front_of_several_models_the_same_is_asked_for() -> None:
    """Before a body is read; their names are not told either."""

    async def work() -> None:
        asked: list[str] = []

        async def model(request: Asked) -> Rendered:
            asked.append(request.path)
            return Rendered(200, b"{}")

        app = ModelRouter({"secret-name": model}, None, 10_000, 5, access(cors_origins=(PAGE,)))
        for path in (
            "/info",
            "/v1/models",
            "/models",
            "/models/x",
            "/v2/models/x",
            "/predict",
            "/health/../info",
            "//",
        ):
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                status, headers, body = await ask(app, method, path, origin=PAGE)
                assert (status, headers["www-authenticate"]) == (401, "Bearer"), (method, path)
                assert headers["access-control-allow-origin"] == PAGE
                assert b"secret-name" not in body
        assert not asked
        assert (await ask(app, "GET", "/models/secret-name/info"))[0] == 401
        assert not asked
        for path in ("/health", "/models/secret-name/", "/models/secret-name/page/page.js"):
            assert (await ask(app, "GET", path))[0] == 200
        assert (await ask(app, "POST", "/models/secret-name/predict", **BEARER))[0] == 200
        assert asked == ["/health", "/", "/page/page.js", "/predict"]

    asyncio.run(work())


def test_access_is_said_once_for_several_models() -> None:
    with pytest.raises(ValidationError, match="access is said once for all models, beside `models`"):
        ModelsConfig.model_validate({"models": {"a": {"access": {"insecure_no_key": True}}}})


LET_IN: tuple[dict[str, str], ...] = (
    {}, {"host": "127.0.0.1:8000"}, {"host": "localhost:8000"}, {"host": "[::1]:8000"}, {"host": "LOCALHOST"},
    {"host": socket.gethostname()}, {"host": "10.1.2.3"}, {"host": "a.localhost:1"}, {"host": "localhost."},
    {"host": "host.docker.internal:8000"},
    {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},  # the server's own page
    {"host": "localhost:9000", "origin": "http://localhost:9000"},  # the same, through ssh -L 9000:localhost:8000
)  # fmt: skip
TURNED_AWAY = (
    {"host": "evil.example:8000"}, {"host": "evil.example:8000", "origin": "http://evil.example:8000"},  # rebinding
    {"host": "localhost.evil.example"}, {"host": "127.0.0.1.evil.example"}, {"host": "[::1"}, {"host": ""},
    {"host": "127.0.0.1:8000", "origin": PAGE}, {"host": "127.0.0.1:8000", "origin": "null"},
    {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:3000"}, {"host": "127.0.0.1:8000", "origin": "http://1.2.3.4"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "status"), [*((each, 200) for each in LET_IN), *((each, 421) for each in TURNED_AWAY)]
)
def test_pages_of_other_sites_do_not_ask_a_server_without_keys(
    headers: dict[str, str], status: int, with_fake_engine: WithEngine
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine, access=Access.of(AccessConfig()))
        for method, path in (("POST", "/predict"), ("GET", "/info")):
            answer = await ask(app, method, path, **{"content-type": "text/plain", **headers})
            assert answer[0] == status, answer
            assert status == 200 or json.loads(answer[2])["error"].endswith((")", "--cors-origin"))

    with_fake_engine(work)


@pytest.mark.parametrize(
    ("config", "headers", "status"),
    [
        ({"cors_origins": (PAGE,)}, {"host": "127.0.0.1:8000", "origin": PAGE}, 200),
        ({"cors_origins": (PAGE,)}, {"host": "app.example.com"}, 200),
        ({"cors_origins": (PAGE,)}, {"host": "127.0.0.1:8000", "origin": "https://other.example"}, 421),
        ({"cors_origins": ("*",)}, {"host": "any.example", "origin": PAGE}, 200),
        ({"insecure_no_key": True}, {"host": "any.example", "origin": PAGE}, 200),
        ({"keys": (f"alice: {KEY}",)}, {"host": "any.example", "origin": PAGE, **BEARER}, 200),
    ],
)
def test_who_runs_the_server_can_let_pages_in(
    config: dict[str, Any], headers: dict[str, str], status: int, with_fake_engine: WithEngine
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine, access=Access.of(AccessConfig(**config)))
        assert (await ask(app, "POST", "/predict", **headers))[0] == status

    with_fake_engine(work)


def test_several_models_turn_such_pages_away_once() -> None:
    asked: list[Asked] = []

    async def model(what: Asked) -> Rendered:
        asked.append(what)
        return Rendered(200, b"{}")

    async def work() -> None:
        app = ModelRouter({"a": model}, "a", 10_000, 5.0, Access.of(AccessConfig(cors_origins=(PAGE,))))
        assert (await ask(app, "POST", "/predict", host="evil.example"))[0] == 421
        assert not asked
        assert (await ask(app, "POST", "/predict", host="app.example.com", origin=PAGE))[0] == 200
        assert not {b"host", b"origin"} & {name for name, _ in asked[0].headers}, "or the model would ask again"

    asyncio.run(work())


def test_an_empty_key_is_none() -> None:
    for shown in (b"Bearer", b"Bearer ", b"bearer   "):
        with pytest.raises(UnauthorizedError, match="asks for a key"):
            access().keys.find(shown)


def test_open_routes_are_open_with_a_slash_too(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine, access=access())
        for path, status in (("/docs/", 307), ("/health/", 307), ("/info/", 401), ("/docs//", 401), ("//", 401)):
            assert (await ask(app, "GET", path))[0] == status, path

    with_fake_engine(work)


def test_of_a_key_that_comes_twice_in_json_the_last_counts_everywhere() -> None:
    """Or the model that is asked and what it is asked would be read differently."""
    twice = b'{"model": "a", "model": "b", "inputs": "x", "inputs": "y"}'
    assert ModelRouter._name_in(twice) == "b"
    assert tei.PredictRequest.model_validate_json(b'{"inputs": "x", "inputs": "y"}').inputs == "y"
