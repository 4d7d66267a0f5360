"""Several models behind one address: a request goes to the model that it names, or is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from pydantic import ValidationError

from tpray.config import BatchConfig, ModelConfig, ModelsConfig, ServeConfig
from tpray.errors import GroupError, InputError, UnknownModelError
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.dialects import cohere, hugging_face, open_inference, tei, vllm, vllm_score
from tpray.serving.dialects.base import Rendered
from tpray.serving.engine import Engine
from tpray.serving.http import make_app
from tpray.serving.metrics import MISSING
from tpray.serving.model_router import Asked, ModelRouter, ask_app
from tpray.serving.scrape import rendered

NAMES = ("small", "org/small")


@asynccontextmanager
async def routed(default: str | None = None) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, FakeExecutor]]]:
    """A client of a router in front of two engines on ranks without a model, and these ranks by name."""
    executors, engines, asks = {name: FakeExecutor(1) for name in NAMES}, list[Engine](), {}
    try:
        for name, executor in executors.items():
            engine = Engine(ClassifierGroup(ModelConfig(dtype="float32"), executor, 5.0), BatchConfig())
            await engine.start()
            engines.append(engine)
            executor.steps.clear()
            asks[name] = partial(ask_app, make_app(engine, served=(name,)))
        transport = httpx.ASGITransport(ModelRouter(asks, default, 2_000_000, 10.0))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, executors
    finally:
        for engine in engines:
            await engine.stop()


def run(work: Callable[[httpx.AsyncClient, dict[str, FakeExecutor]], Awaitable[None]], default: str | None) -> None:
    async def main() -> None:
        async with routed(default) as (client, executors):
            await asyncio.wait_for(work(client, executors), 30)

    asyncio.run(main())


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_answered_by_the_model_that_it_names(name: str) -> None:
    documents: dict[str, Any] = {"query": "a", "documents": ["b", "c"]}

    async def work(client: httpx.AsyncClient, executors: dict[str, FakeExecutor]) -> None:
        asked = [
            ("/v1/rerank", documents | {"model": name}),
            ("/classify", {"input": [[1, 2]], "model": name}),
            (f"/models/{name}/predict", {"inputs": "a"}),
            (f"/models/{name}/v1/rerank", documents),
        ]
        for path, body in asked:
            before = {each: len(executor.steps) for each, executor in executors.items()}
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            grown = {each for each, executor in executors.items() if len(executor.steps) > before[each]}
            assert grown == {name}, path
        for path in ("/v1/models", "/models", "/infinity/models"):
            assert [each["id"] for each in (await client.get(path)).json()["data"]] == list(NAMES)
        assert (await client.get(f"/models/{name}/info")).json()["model_id"] == (await info(client))[name]["model_id"]
        assert (await client.get(f"/models/{name}/docs")).headers["content-type"].startswith("text/html")

    run(work, None)


async def info(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/info")).json()["models"]
    return found


@pytest.mark.parametrize("default", [None, "small"])
def test_what_names_no_model_goes_to_the_default_one_or_is_refused(default: str | None) -> None:
    async def work(client: httpx.AsyncClient, executors: dict[str, FakeExecutor]) -> None:
        for body in ({"inputs": "a"}, {"inputs": "a", "model": ""}, {"inputs": ['"model": "org/small"']}):
            answer = await client.post("/predict", json=body)
            if default is None:
                assert answer.status_code == 422
                assert "names none" in answer.json()["error"]
                assert "small, org/small" in answer.json()["error"]
            else:
                assert answer.status_code in (200, 422)
        assert not executors["org/small"].steps
        assert bool(executors["small"].steps) == (default is not None)
        for path in ("/openapi.json", "/docs", "/docs/assets/swagger-ui.css", "/page/docs.js"):
            assert (await client.get(path)).status_code == 200, path
        assert set(await info(client)) == set(NAMES)
        assert (await client.get("/health")).status_code == 200
        home = await client.get("/")
        assert (home.status_code, home.headers["location"]) == (307, "models/small/")

    run(work, default)


def test_a_name_that_no_model_has_is_refused_with_those_there_are() -> None:
    async def work(client: httpx.AsyncClient, executors: dict[str, FakeExecutor]) -> None:
        body = {"query": "a", "documents": ["b"], "model": "smal"}
        for path in ("/v1/rerank", "/models/smal/predict", "/models/smaller/predict", "/v2/models/smal/infer"):
            answer = await client.post(path, json=body)
            assert answer.status_code == 404, path
            assert "there is small, org/small" in answer.text
        huge = await client.post("/v1/rerank", content=b'{"model": "small", "documents": [' + b"0," * 70_000 + b"0]}")
        assert huge.status_code == 413
        assert not any(executor.steps for executor in executors.values())

    run(work, "small")


@pytest.mark.parametrize(
    ("path", "worded"),
    [
        ("/models/smal/predict", tei),
        ("/v1/rerank", cohere),
        ("/models/smal/v2/rerank", cohere),
        ("/models/org/smal", hugging_face),
        ("/classify", vllm),
        ("/models/org/smal/score", vllm_score),
        ("/v2/models/org/smal/infer", open_inference),
    ],
)
def test_what_is_refused_is_worded_by_the_dialect_of_the_route(path: str, worded: Any) -> None:
    def without_numbers(body: bytes) -> str:
        return re.sub(r"[0-9a-f-]{32,}", "ID", body.decode())

    async def work(client: httpx.AsyncClient, executors: dict[str, FakeExecutor]) -> None:
        answer = await client.post(path, json={"model": "smal"})
        (said,) = re.findall(r"there is no model '\w+' here: there is small, org/small", answer.text)
        expected = worded.DIALECT.render_error(UnknownModelError(said))
        assert answer.status_code == expected.status == 404
        assert without_numbers(answer.content) == without_numbers(expected.body)

    run(work, None)


def router_of(**asks: Any) -> tuple[ModelRouter, set[str]]:
    """A router of models that give these answers, or raise them; and those that have started."""

    def ask(given: Rendered | Exception) -> Any:
        async def answer(_: Asked) -> Rendered:
            if isinstance(given, Exception):
                raise given
            return given

        return answer

    started = set(asks)
    models = {name: ask(given) for name, given in asks.items()}
    return ModelRouter(models, None, 10_000, 5, has_started=started.__contains__), started


def test_a_model_that_comes_or_goes_leaves_the_others_well() -> None:
    async def work() -> None:
        listed = Rendered(200, b'{"object": "list", "data": [{"id": "a"}]}')
        router, started = router_of(a=listed, gone=GroupError("it was removed"), new=listed)
        started.remove("new")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://test") as client:
            assert (await client.get("/health")).status_code == 200
            assert len((await client.get("/v1/models")).json()["data"]) == 1
            for name, said in (("new", "'new' has not started yet"), ("gone", "it was removed")):
                answer = await client.post(f"/models/{name}/predict", json={})
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
                assert said in answer.json()["error"]
            started.clear()
            assert (await client.get("/health")).status_code == 503

    asyncio.run(work())


def test_a_model_that_is_ill_makes_the_application_ill() -> None:
    async def work(client: httpx.AsyncClient, executors: dict[str, FakeExecutor]) -> None:
        executors["org/small"].delay(0, 30)
        answer = await client.get("/health", headers={"x-request-timeout-seconds": "1"})
        assert answer.status_code == 503

    run(work, "small")


def test_a_default_that_is_no_model_and_names_given_twice_are_refused() -> None:
    with pytest.raises(ValidationError, match="default is 'b', and the models are a"):
        ModelsConfig(models={"a": ServeConfig()}, default="b")
    with pytest.raises(ValidationError, match="leave it out"):
        ModelsConfig(models={"a": ServeConfig(served_model_name=("b",))})


def test_below_a_prefix_models_are_asked_without_it() -> None:
    """As Serve asks an application, with the prefix in ``path`` and in ``root_path``."""

    async def work() -> None:
        asked: list[str] = []

        async def model(request: Asked) -> Rendered:
            asked.append(request.path)
            return Rendered(200, b"{}")

        router = ModelRouter({"a": model, "org/a": model}, None, 10_000, 5)
        transport = httpx.ASGITransport(router, root_path="/x")
        async with httpx.AsyncClient(transport=transport, base_url="http://test/x") as client:
            for path in ("/models/a/predict", "/models/org/a", "/v2/models/a/infer"):
                assert (await client.post(path, json={})).status_code == 200
            assert (await client.get("/page/page.js")).status_code == 200
        assert asked == ["/predict", "/models/org/a", "/v2/models/a/infer", "/page/page.js"]

    asyncio.run(work())


def test_a_python_call_names_its_model_too() -> None:
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import RayServeException

    from tpray.serving.models import Models

    class Handle:
        """Of a deployment that answers with its name, or fails as Serve has it fail."""

        def __init__(self, name: str) -> None:
            self.classify, self._name = self, name

        async def remote(self, *asked: Any, **options: Any) -> Any:
            if asked == ("bad",):
                raise RayTaskError("classify", "", InputError("it is bad"))
            if asked == ("gone",):
                raise RayServeException("there is no replica")
            return self._name, asked, options

    async def work() -> None:
        kind: Any = cast(Any, Models).func_or_class.__bases__[0]  # without what Serve puts around it
        front = kind.__new__(kind)
        front._handles, front._default = {"a": Handle("a"), "org/b": Handle("org/b")}, None
        assert await front.classify("x", model="org/b", top_k=1) == ("org/b", ("x",), {"top_k": 1})
        for model, asked, kind, said in (
            (None, "x", InputError, "say which, as in model='a'"),
            ("c", "x", UnknownModelError, "there is no model 'c' here: there is a, org/b"),
            ("a", "bad", InputError, "it is bad"),
            ("a", "gone", GroupError, "the model 'a' does not answer now"),
        ):
            with pytest.raises(kind, match=re.escape(said)):
                await front.classify(asked, model=model)
        front._default = "a"
        assert (await front.classify("x"))[0] == "a"

    asyncio.run(work())


def test_a_model_that_has_not_started_is_missing_in_the_metrics_and_not_waited_for() -> None:
    async def work() -> None:
        text, kind = rendered([], [(("a", "r"), 0.0)], "")
        router, started = router_of(a=Rendered(200, text, {"content-type": kind}), new=AssertionError("it was asked"))
        started.remove("new")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://test") as client:
            answer = await client.get("/metrics")
        assert answer.status_code == 200, answer.text
        missing = [s for family in parse_text(answer.text) for s in family.samples if s.name == MISSING]
        assert {s.labels["model"]: s.value for s in missing} == {"a": 0, "new": 1}

    asyncio.run(work())


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_what_no_model_was_asked_is_in_the_metrics_too(accept: str) -> None:
    async def work(client: httpx.AsyncClient, executors: dict[str, FakeExecutor]) -> None:
        await client.post("/classify", json={"model": "smal", "input": "a"})
        await client.post("/models/smal/predict", json={"inputs": "a"})
        await client.get("/v2/models/smal")
        await client.post("/classify", json={"model": "small", "input": "a"})
        families = parser_of(accept)((await client.get("/metrics", headers={"accept": accept})).text)
        samples = [s for family in families for s in family.samples if s.name == "tpray_requests_total"]
        said = [(s.labels["model"], s.labels["dialect"], s.labels["status"], s.value) for s in samples]
        own = [s.labels["replica"] for s in samples if not s.labels["model"]]
        assert own == ["router"] * 3
        assert sorted(said)[:3] == [
            ("", "none", "404", 1.0), ("", "text-embeddings-inference", "404", 1.0), ("", "vLLM", "404", 1.0)
        ]  # fmt: skip
        assert ("small", "vLLM", "200", 1.0) in said

    run(work, None)


def parser_of(accept: str) -> Callable[[str], Any]:
    parse: Callable[[str], Any] = openmetrics.text_string_to_metric_families if accept else parse_text
    return parse


def test_what_is_in_front_is_replaced_when_what_it_tells_of_requests_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpray.serving import models

    versions = []

    def replaceable(deployment: Any, version: str) -> Any:
        versions.append(version)
        return deployment

    monkeypatch.setattr(models, "application_of", lambda config, name, behind: None)
    monkeypatch.setattr(models, "replaceable", replaceable)
    for telemetry in ({}, {}, {"log_requests": True}):
        models.build(ModelsConfig.model_validate({"models": {"a": {}, "b": {}}, "telemetry": telemetry}))
    assert versions[0] == versions[1] != versions[2]
