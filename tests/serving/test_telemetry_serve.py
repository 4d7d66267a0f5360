"""A real server whose spans a collector gets, and whose processes log JSON lines: HTTP, gRPC and a Python handle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tpray
from tests.otlp import Collector, Sent, collecting
from tests.served import Running, start
from tpray.config import set_variables

pytestmark = pytest.mark.ray

TRACE, OF_GRPC, OF_HANDLE = (f"{number:032x}" for number in (0xA1, 0xB2, 0xC3))
CALLER = "b7ad6b7169203331"
FORGED = "x\nERROR tpray: forged"


def sent_by(trace_id: str) -> str:
    return f"00-{trace_id}-{CALLER}-01"


@dataclass
class Told:
    """server: it has ended. lines: of its log."""

    server: Running
    collector: Collector
    headers: dict[str, Any]
    lines: list[dict[str, Any]]

    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["logger"] == "tpray.serving.observer"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Told]:
    """What a server tells of requests of each kind until it has ended in order."""
    with collecting() as collector:
        grpc_port = free_port()
        # The variable, and not the flag: it has to reach the replica. The last spans come at the end alone.
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
        set_variables(variables)
        key = "quite-secret-key"
        flags = ("--tp", "2", "--log-format", "json", "--log-requests", "--api-key", key, "--grpc-port", str(grpc_port))
        try:
            server = start(free_port(), tmp_path_factory.mktemp("telemetry"), *flags)
        finally:
            set_variables(dict.fromkeys(variables))
        try:
            headers = {"authorization": f"Bearer {key}", "traceparent": sent_by(TRACE), "x-request-id": "mine"}
            answered = server.predict({"inputs": [["a b", "c d"], ["e f", "g h"]]}, headers=headers)
            assert answered.status_code == 200, answered.text
            unsafe = server.predict({"inputs": ["a", "b"]}, headers=headers | {"x-request-id": "a b" * 100})
            server.predict({"inputs": ["a", "b"]}, params={"q": FORGED})  # without a key
            server.predict({FORGED: 1}, headers=headers)
            ask_over_grpc(grpc_port, key)
            ask_by_the_handle(server.url)
        finally:
            server.process.send_signal(signal.SIGINT)
            server.process.wait(60)
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        yield Told(server, collector, {"taken": answered.headers, "made": unsafe.headers}, lines)


def ask_over_grpc(port: int, key: str) -> None:
    """In a process of its own: one cannot have the protocol's messages and Triton's, which other tests import."""
    arguments = [f"127.0.0.1:{port}", f"Bearer {key}", sent_by(OF_GRPC)]
    subprocess.run([sys.executable, "-c", OVER_GRPC, *arguments], check=True, timeout=120)


OVER_GRPC = """
import sys
import grpc
from tpray.serving.oip import open_inference_pb2 as messages
from tpray.serving.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub

address, authorization, traceparent = sys.argv[1:]
request = messages.ModelInferRequest(model_name="any")
tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1])
tensor.contents.bytes_contents.append(b"a b")
metadata = (("authorization", authorization), ("traceparent", traceparent))
with grpc.insecure_channel(address) as channel:
    GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=metadata, timeout=30)
"""


def ask_by_the_handle(url: str) -> None:
    """Within a span of this process's own code."""
    from opentelemetry import context, trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    here = SpanContext(int(OF_HANDLE, 16), int(CALLER, 16), False, TraceFlags(1))
    token = context.attach(trace.set_span_in_context(NonRecordingSpan(here)))
    try:
        tpray.connect(url=url).classify.remote(("a", "b")).result(60)
    finally:
        context.detach(token)


def by_name(spans: list[Sent]) -> dict[str, list[Sent]]:
    found: dict[str, list[Sent]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span)
    return found


def test_a_request_has_all_its_spans_below_the_callers(told: Told) -> None:
    answered = [span for span in told.collector.of(TRACE) if span.attributes.get("tpray.request_id") == "mine"]
    server = next(span for span in answered if span.attributes["http.response.status_code"] == 200)
    assert (server.name, server.parent, server.kind) == ("POST /predict", CALLER, 2)
    assert server.attributes["tpray.key"] == "default"
    assert server.resource["service.name"] == "tpray"
    below = by_name([span for span in told.collector.of(TRACE) if span.parent == server.span_id])
    assert {name: len(spans) for name, spans in below.items()} == {"tokenise": 1, "queue": 1, "step": 1}
    (step,) = below["step"]
    ranks = [span for span in told.collector.of(TRACE) if span.parent == step.span_id]
    assert sorted(rank.attributes["tpray.rank"] for rank in ranks) == [0, 1]
    for rank in ranks:
        assert rank.name == "rank"
        assert rank.attributes["tpray.rank.compute_s"] > 0
        assert rank.attributes["tpray.rank.wait_s"] > 0
    order = [server.start_ns, *(below[name][0].start_ns for name in ("tokenise", "queue", "step")), step.end_ns]
    assert [*order, server.end_ns] == sorted([*order, server.end_ns])


@pytest.mark.parametrize(
    ("trace_id", "name"), [(OF_GRPC, "inference.GRPCInferenceService/ModelInfer"), (OF_HANDLE, "classify")]
)
def test_a_request_over_grpc_or_by_the_handle_has_them_too(told: Told, trace_id: str, name: str) -> None:
    spans = by_name(told.collector.of(trace_id))
    assert {name: len(each) for name, each in spans.items()} == {
        name: 1,
        "tokenise": 1,
        "queue": 1,
        "step": 1,
        "rank": 2,
    }
    assert spans[name][0].parent == CALLER


def test_the_command_prints_a_line_for_each_request(told: Told) -> None:
    assert told.headers["taken"].get_list("x-request-id") == ["mine"]
    (made,) = told.headers["made"].get_list("x-request-id")
    assert len(made) <= 128
    assert " " not in made
    asked = [line for line in told.requests() if line["method"] != "GET"]  # the command asks for pages itself
    assert [(line["method"], line["status"]) for line in asked] == [
        ("POST", 200), ("POST", 200), ("POST", 401), ("POST", 422), ("grpc", "OK"), ("handle", 200)
    ]  # fmt: skip
    first = asked[0]
    expected = {"path": "/predict", "rows": 2, "key": "default", "request_id": "mine", "trace_id": TRACE}
    assert first.items() >= expected.items()
    assert first["tokens"] > 4
    assert 0 < first["compute_ms"] <= first["total_ms"]
    assert asked[1]["request_id"] == made
    assert all(line["trace_id"] == of for line, of in zip(asked[4:], (OF_GRPC, OF_HANDLE), strict=True))


def test_every_line_of_the_command_and_its_processes_is_json(told: Told) -> None:
    for line in told.lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    assert any(line["message"].startswith("Ready ") for line in told.lines)
    assert told.lines[-1]["message"] == "Stopped"
    assert "a b" not in json.dumps(told.requests())


@pytest.mark.nightly
def test_a_collector_that_is_not_there_is_told_of_once(tmp_path: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    server = start(port, tmp_path, "--tp", "2", "--log-format", "text", "--otlp-endpoint", "http://127.0.0.1:9")
    try:
        for _ in range(200):
            assert server.predict({"inputs": ["a", "b"]}).status_code == 200
        give_up = time.monotonic() + 60
        while "spans do not reach" not in server.log.read_text() and time.monotonic() < give_up:
            time.sleep(0.5)
        said = server.log.read_text()
        assert said.count("spans do not reach http://127.0.0.1:9/v1/traces") == 1
        assert "Traceback" not in said
    finally:
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
    assert time.monotonic() - started < 30
