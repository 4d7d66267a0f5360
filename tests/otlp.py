"""A collector in this process: takes what OTLP over HTTP sends, and reads it by OpenTelemetry's own definitions."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Sent:
    """A span as it came."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    kind: int
    attributes: dict[str, Any]
    events: list[dict[str, Any]]
    failed: bool
    start_ns: int
    end_ns: int
    resource: dict[str, Any]


class Collector:
    """url: what senders are told. headers: of the last request."""

    def __init__(self) -> None:
        self.spans: list[Sent] = []
        self.headers: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                collector.headers = {name.lower(): value for name, value in self.headers.items()}
                collector.spans += read(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, trace_id: str) -> list[Sent]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def wait(self, enough: Callable[[], bool], within_s: float = 30) -> None:
        give_up = time.monotonic() + within_s
        while not enough():
            assert time.monotonic() < give_up, [span.name for span in self.spans]
            time.sleep(0.05)


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


def read(body: bytes) -> list[Sent]:
    request, found = ExportTraceServiceRequest.FromString(body), []
    for of_resource in request.resource_spans:
        resource = values(of_resource.resource.attributes)
        for scope in of_resource.scope_spans:
            for span in scope.spans:
                events = [{"name": event.name} | values(event.attributes) for event in span.events]
                found.append(
                    Sent(
                        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind,
                        values(span.attributes), events, span.status.code == 2, span.start_time_unix_nano,
                        span.end_time_unix_nano, resource,
                    )
                )  # fmt: skip
    return found


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
