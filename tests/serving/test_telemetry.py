"""Traces and log lines of requests, over ranks without a model: what they hold, and what becomes of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.otlp import collecting
from tests.serving.conftest import WithEngine
from tpray.config import ModelsConfig, ServeConfig, TelemetryConfig
from tpray.errors import ConfigError, InputError
from tpray.group.fake_executor import FakeExecutor
from tpray.serving import telemetry
from tpray.serving.door import Door
from tpray.serving.engine import Engine
from tpray.serving.http import make_app
from tpray.serving.load import HANDLE
from tpray.serving.model_router import ModelRouter, ask_app
from tpray.serving.observer import Observer, log_context
from tpray.serving.oip.service import GRPC
from tpray.serving.request_notes import NOTES, RequestNotes
from tpray.serving.telemetry import RequestSpans

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SECRET = "the patient's name"


class Watched:
    """An observer whose spans stay here."""

    def __init__(self, log_requests: bool = True, log_inputs: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        config = TelemetryConfig(log_requests=log_requests, log_inputs=log_inputs)
        spans = RequestSpans(SimpleSpanProcessor(self.exporter), log_inputs)
        self.observer = Observer(config, spans, lambda: "from-serve")

    def client(self, app: Door | ModelRouter) -> httpx.AsyncClient:
        seen = self.observer.app(app, app.route_of if isinstance(app, Door) else None)
        transport = httpx.ASGITransport(seen, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://tpray")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


class Caught(logging.Handler):
    """The fields of the lines of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(vars(record)["fields"])


@pytest.fixture
def caught() -> Iterator[Caught]:
    handler, log = Caught(), logging.getLogger("tpray.serving.observer")
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


ASKED: list[tuple[str, dict[str, Any], str, int]] = [
    ("/predict", {"inputs": [["a"], ["b"]]}, "/predict", 2),
    ("/", {"inputs": ["a", "b"]}, "/", 2),
    ("/models/org/any", {"inputs": "a"}, "/models/{owner}/{model}", 1),
    ("/classify", {"input": "a", "model": "any"}, "/classify", 1),
    ("/infinity/classify", {"input": ["a"], "model": "any"}, "/infinity/classify", 1),
    ("/v1/rerank", {"query": "a", "documents": ["b", "c"], "model": "any"}, "/v1/rerank", 2),
    ("/rerank/", {"query": "a", "texts": ["b", "c"]}, "/rerank", 2),
    ("/score", {"text_1": "a", "text_2": "b", "model": "any"}, "/score", 1),
    (
        "/v2/models/any/infer",
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
        "/v2/models/{model:path}/infer",
        1,
    ),
]


def test_a_request_of_each_dialect_has_a_whole_trace(with_fake_engine: WithEngine, caught: Caught) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        for path, body, route, rows in ASKED:
            watched = Watched()
            caught.lines.clear()
            async with watched.client(make_app(engine)) as http:
                sent = {"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "mine"}
                answer = await http.post(path, json=body, headers=sent)
            assert answer.status_code == 200, (path, answer.text)
            (server,) = watched.named(f"POST {route}")
            own, context, caller = attributes(server), server.get_span_context(), server.parent
            assert context is not None
            assert caller is not None
            assert (f"{context.trace_id:032x}", f"{caller.span_id:016x}") == (TRACE, CALLER)
            assert (own["http.route"], own["http.response.status_code"], own["url.path"]) == (route, 200, path)
            assert (own["tpray.rows"], own["tpray.request_id"]) == (rows, "mine")
            assert own["tpray.dialect"]
            (step,), ranks = watched.named("step"), watched.named("rank")
            below = [*watched.named("tokenise"), *watched.named("queue"), step]
            assert len(below) == 3
            assert all(span.parent and span.parent.span_id == context.span_id for span in below)
            assert [attributes(rank)["tpray.rank"] for rank in ranks] == [0, 1]
            assert all(rank.parent == step.get_span_context() for rank in ranks)
            assert len(watched.spans) == 6
            (line,) = caught.lines
            assert (line["path"], line["status"], line["rows"], line["request_id"]) == (path, 200, rows, "mine")
            assert (line["trace_id"], line["dialect"]) == (TRACE, own["tpray.dialect"])
            assert 0 <= line["queue_ms"] <= line["total_ms"]

    with_fake_engine(work)


def test_a_step_that_is_over_holds_no_request_and_no_logits(with_fake_engine: WithEngine) -> None:
    """Else they would hold each other until the garbage collector comes, and with them bodies and outputs."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        notes = RequestNotes("a", 0)
        token = NOTES.set(notes)
        await engine.classify(["a", "b"])
        NOTES.reset(token)
        ((step, waited_ns),) = notes.steps
        assert waited_ns <= step.began_ns
        assert step.result is not None
        assert step.result.outputs == ()
        held = gc.get_referents(step)
        assert notes not in held + gc.get_referents(*held)

    with_fake_engine(work)


def test_what_is_logged_of_a_row_is_said_of_its_own_request(with_fake_engine: WithEngine) -> None:
    """And not of the one that woke the queue."""
    said = []

    class Says(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((log_context(lambda: "")["request_id"], vars(record)["fields"]["request_id"]))

    async def ask(engine: Engine, text: str) -> None:
        NOTES.set(RequestNotes(f"of-{text}", 0))
        await engine.classify([text])

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        bad = engine.codec.encode(["bad"])[0].ids[1]
        executor.raise_on(lambda ids: bool((ids == bad).any()), "ValueError: bad row")
        await asyncio.gather(*(asyncio.create_task(ask(engine, text)) for text in ("a", "bad")), return_exceptions=True)
        assert said == [(None, "of-bad")]

    handler, log = Says(), logging.getLogger("tpray.serving.batcher")
    log.addHandler(handler)
    try:
        with_fake_engine(work)
    finally:
        log.removeHandler(handler)


def test_requests_that_share_a_step_have_it_in_each_trace(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        watched = Watched()
        async with watched.client(make_app(engine)) as http:
            await asyncio.gather(*(http.post("/predict", json={"inputs": [["a"], ["b"]]}) for _ in range(3)))
        steps = watched.named("step")
        assert len({span.get_span_context().trace_id for span in steps}) == 3  # type: ignore[union-attr]
        assert {attributes(step)["tpray.step.requests"] for step in steps} == {3}
        assert {attributes(step)["tpray.step.rows"] for step in steps} == {6}
        assert len(executor.steps) == 1

    with_fake_engine(work)


def test_a_request_that_is_run_again_after_a_rank_died_shows_both_attempts(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        watched = Watched()
        executor.hang(0)
        async with watched.client(make_app(engine)) as http:
            asked = asyncio.ensure_future(http.post("/predict", json={"inputs": [["a"]]}))
            await asyncio.sleep(0.1)
            executor.die(1)
            assert (await asked).status_code == 200
        first, second = watched.named("step")
        assert [attributes(step)["tpray.step.number"] for step in (first, second)] == [1, 2]
        assert first.status.status_code is StatusCode.ERROR
        assert attributes(first)["error.type"] == "RankError"
        (event,) = first.events
        assert event.attributes is not None
        assert event.attributes["exception.message"] == "rank 1 died"
        assert second.status.status_code is StatusCode.UNSET
        waited = watched.named("queue")[1]
        assert (waited.start_time, waited.end_time) == (first.end_time, second.start_time)
        assert watched.named("POST /predict")[0].status.status_code is StatusCode.UNSET

    with_fake_engine(work)


@pytest.mark.parametrize("told", [False, True])
def test_what_a_client_sends_is_told_only_where_that_is_asked_for(
    told: bool, with_fake_engine: WithEngine, caught: Caught
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        watched = Watched(log_inputs=told)
        async with watched.client(make_app(engine)) as http:
            assert (await http.post("/predict", json={"inputs": [[SECRET]]})).status_code == 200
            assert (await http.post("/predict", json={"inputs": [[SECRET]], SECRET: 1})).status_code == 422
            executor.raise_on(lambda ids: ids.shape != (2, 4), f"ValueError: {SECRET}")  # but for the canary
            await http.post("/predict", json={"inputs": [[SECRET]]})
        everything = "".join(span.to_json() for span in watched.spans) + str(caught.lines)
        assert (SECRET in everything) == told
        assert len(caught.lines) == 3

    with_fake_engine(work)


def test_errors_are_noted_by_their_type(with_fake_engine: WithEngine, caught: Caught) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        watched = Watched()
        async with watched.client(make_app(engine)) as http:
            assert (await http.post("/predict", json={"inputs": [[""]]})).status_code == 400
            await engine.stop()
            assert (await http.post("/predict", json={"inputs": [["a"]]})).status_code == 503
            assert (await http.get("/nowhere%0AINFO forged")).status_code == 404
        refused, failed = watched.named("POST /predict")
        assert refused.status.status_code is StatusCode.UNSET, "the client's fault is no error of the server"
        assert [event.attributes["exception.type"] for event in refused.events if event.attributes] == [
            "tpray.errors.EmptyInputError"
        ]
        assert (failed.status.status_code, attributes(failed)["error.type"]) == (StatusCode.ERROR, "GroupError")
        assert "http.route" not in attributes(watched.named("GET")[0])
        assert [line.get("error") for line in caught.lines] == ["EmptyInputError", "GroupError", "HTTPException"]

    with_fake_engine(work)


def test_what_is_not_sampled_costs_no_spans(with_fake_engine: WithEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        watched = Watched()
        async with watched.client(make_app(engine)) as http:
            await http.post("/predict", json={"inputs": [["a"]]})
            assert not watched.spans
            await http.post("/predict", json={"inputs": [["a"]]}, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
            assert len(watched.spans) == 6, "the caller has decided"

    with_fake_engine(work)


def test_a_model_behind_a_router_belongs_to_the_routers_span(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        front, behind = Watched(), Watched()
        door = make_app(engine, served=("small",))
        router = ModelRouter({"small": partial(ask_app, behind.observer.app(door, door.route_of))}, None, 10_000, 5.0)
        async with front.client(router) as http:
            sent = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            answer = await http.post("/classify", json={"input": "a", "model": "small"}, headers=sent)
            assert answer.status_code == 200, answer.text
        (passed,), (served,) = front.spans, behind.named("POST /classify")
        assert served.parent is not None
        context = passed.get_span_context()
        assert context is not None
        assert (served.parent.span_id, served.parent.trace_id) == (context.span_id, int(TRACE, 16))

    with_fake_engine(work)


def test_the_handle_and_grpc_are_watched(with_fake_engine: WithEngine, caught: Caught) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        watched, given = Watched(), f"00-{TRACE}-{CALLER}-01"

        async def classify(inputs: list[str]) -> list[Any]:
            return (await engine.classify(inputs)).rendered()

        call = watched.observer.call(classify, "classify")
        assert len(await call(["a", "b"], traceparent=given)) == 2
        with pytest.raises(InputError):
            await call([""])

        async def infer(request: Any, grpc_context: Any) -> None:
            await engine.classify(["a"])

        metadata = (("traceparent", given),)
        context = SimpleNamespace(invocation_metadata=lambda: metadata, code=lambda: None)
        await watched.observer.rpc(infer, "inference.GRPCInferenceService", "ModelInfer", GRPC)(None, context)
        handled, failed = watched.named("classify")
        assert f"{handled.get_span_context().trace_id:032x}" == TRACE  # type: ignore[union-attr]
        assert (failed.status.status_code, failed.parent) == (StatusCode.UNSET, None)
        (over_grpc,) = watched.named("inference.GRPCInferenceService/ModelInfer")
        assert over_grpc.parent is not None
        assert attributes(over_grpc)["rpc.grpc.status_code"] == 0
        said = [(line["method"], line["dialect"], line["status"], line.get("rows")) for line in caught.lines]
        assert said == [("handle", HANDLE, 200, 2), ("handle", HANDLE, 400, None), ("grpc", GRPC, "OK", 1)]
        assert {line["request_id"] for line in caught.lines} == {"from-serve"}

    with_fake_engine(work)


def test_an_id_that_could_do_harm_is_not_taken(with_fake_engine: WithEngine, caught: Caught) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with Watched().client(make_app(engine)) as http:
            for given in ("a b", "x" * 129, 'q"', ""):
                await http.post("/predict", json={"inputs": [["a"]]}, headers={"x-request-id": given})
        made = [line["request_id"] for line in caught.lines]
        assert all(len(each) == 32 for each in made)
        assert len(set(made)) == 4

    with_fake_engine(work)


def test_spans_reach_a_collector_with_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20mine")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "named-here")
        observer = Observer.of(TelemetryConfig(), lambda: "")
        assert observer is not None

        async def classify() -> None:
            return None

        async def work() -> None:
            await observer.call(classify, "classify")()
            await observer.close()

        asyncio.run(work())
        (span,) = collector.spans
        assert (span.name, span.resource["service.name"]) == ("classify", "named-here")
        assert collector.headers["authorization"] == "Bearer mine"


def test_a_collector_that_does_not_answer_is_told_of_once(
    free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("OTEL_BSP_SCHEDULE_DELAY", "50"), ("OTEL_BSP_MAX_QUEUE_SIZE", "64"),
                        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    observer = Observer.of(TelemetryConfig(otlp_endpoint=f"http://127.0.0.1:{free_port()}"), lambda: "")
    assert observer is not None

    async def classify() -> None:
        return None

    async def work() -> None:
        watched, started = observer.call(classify, "classify"), time.monotonic()
        for _ in range(1000):
            await watched()
        assert time.monotonic() - started < 5, "nobody waits for it"
        give_up = time.monotonic() + 20
        while not caplog.records and time.monotonic() < give_up:
            await asyncio.sleep(0.05)
        for _ in range(100):
            await watched()
        await observer.close()
        assert time.monotonic() - give_up < telemetry.FLUSH_S + 2

    asyncio.run(work())
    (said,) = [record.getMessage() for record in caplog.records]
    assert "spans do not reach http://127.0.0.1" in said


def test_without_the_exporter_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry.check(TelemetryConfig())
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    telemetry.check(TelemetryConfig())
    with pytest.raises(ConfigError, match=r"--otlp-endpoint asks for .*: pip install 'tpray\[otel\]'"):
        telemetry.check(TelemetryConfig(otlp_endpoint="http://localhost:4318"))


def test_what_the_environment_asks_for_and_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="tpray sends http/protobuf: set OTEL_EXPORTER_OTLP_PROTOCOL"):
        telemetry.check(TelemetryConfig())
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    telemetry.check(TelemetryConfig())
    with pytest.raises(ValueError, match="is no URL of a collector"):
        TelemetryConfig(otlp_endpoint="localhost:4318")


def test_telemetry_is_said_once_for_several_models() -> None:
    told = TelemetryConfig(log_requests=True)
    assert ModelsConfig(models={"a": ServeConfig()}, telemetry=told).telemetry == told
    with pytest.raises(ValueError, match="a: telemetry is said once for all models"):
        ModelsConfig(models={"a": ServeConfig(telemetry=told)})
