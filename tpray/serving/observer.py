"""Watches requests from their arrival to their answer: a trace, and a line in the log, where these are asked for.

What is not asked for is not there: without an `Observer` the application, its gRPC methods and those of its handle are
called as they are.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tpray.config import TelemetryConfig
from tpray.serving.dialects.base import CLIENT_LEFT, headers_of
from tpray.serving.dialects.tei import render_error
from tpray.serving.keys import ASKING
from tpray.serving.load import HANDLE
from tpray.serving.request_notes import NOTES, RequestNotes
from tpray.serving.telemetry import CARRIED, RequestSpans

log = logging.getLogger(__name__)

INPUT_CHARS = 2000
"""So much is told of what a request sent."""
UNFORESEEN = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""gRPC's codes for what is the server's error, by OpenTelemetry's conventions."""

_ID = re.compile(r"[\w.:/+=@~-]{1,128}", re.ASCII)
_HOST = re.compile(r"(\[[^\]]+\]|[^:]+)(?::(\d{1,5}))?")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))

Call = Callable[..., Awaitable[Any]]
RouteOf = Callable[[Scope], tuple[str, str]]


def known_id(given: str) -> str:
    """A request's id as its caller gives it, if it is short and of safe characters; else one that is made."""
    return given if _ID.fullmatch(given) else secrets.token_hex(16)


def log_context(request_id: Callable[[], str]) -> dict[str, Any]:
    """What a replica says beside its messages: of the request that the current task answers.

    Args:
        request_id: Serve's, of the current task; "": there is none.
    """
    notes, caller = NOTES.get(), ASKING.get()
    span = None if notes is None or notes.span is None else notes.span.get_span_context()
    given = notes.request_id if notes is not None else request_id()
    return {
        "request_id": given if _ID.fullmatch(given) else None,
        "key": None if caller is None else caller.name,
        "trace_id": None if span is None or not span.is_valid else f"{span.trace_id:032x}",
        "span_id": None if span is None or not span.is_valid else f"{span.span_id:016x}",
    }


class Observer:
    """Watches the requests of a replica.

    Args:
        spans: makes their traces; None: nobody asks for them.
        request_id: Serve's, of the current task.
    """

    def __init__(self, config: TelemetryConfig, spans: RequestSpans | None, request_id: Callable[[], str]) -> None:
        self._config, self._spans, self._request_id = config, spans, request_id
        if config.log_requests:
            log.setLevel(logging.INFO)  # whatever the level of the others

    @classmethod
    def of(cls, config: TelemetryConfig, request_id: Callable[[], str]) -> Observer | None:
        """As configured; None: nothing is asked for.

        Raises:
            ConfigError: see `telemetry.check`.
        """
        spans = RequestSpans.of(config)
        return cls(config, spans, request_id) if spans is not None or config.log_requests else None

    def app(self, app: ASGIApp, route_of: RouteOf | None = None) -> ASGIApp:
        """``app``, watched. route_of: a request's route and dialect, "" for none; None: it passes requests on."""
        return _Watched(self, app, route_of)

    def call(self, call: Call, name: str) -> Call:
        """A method of the handle, watched; its ``traceparent`` is the caller's. Its status is as in the metrics."""

        @functools.wraps(call)
        async def watched(*arguments: Any, traceparent: str | None = None, **named: Any) -> Any:
            carried = {} if traceparent is None else {"traceparent": traceparent}
            notes = self.begin(name, self._request_id(), carried, {"rpc.system": "ray_serve", "rpc.method": name})
            notes.fields |= {"method": "handle", "path": name, "dialect": HANDLE}
            if self._config.log_inputs:
                notes.fields["input"] = repr((arguments, named))[:INPUT_CHARS]
            token = NOTES.set(notes)
            try:
                return await call(*arguments, **named)
            except BaseException as e:
                notes.error = e
                raise
            finally:
                NOTES.reset(token)
                status = 200 if notes.error is None else CLIENT_LEFT
                if isinstance(notes.error, Exception):
                    status = render_error(notes.error).status
                self.end(notes, status, {}, type(notes.error).__name__ if status >= 500 else None)

        return watched

    def rpc(self, call: Call, service: str, name: str, dialect: str) -> Call:
        """A gRPC method of the deployment, watched. dialect: that it counts for in the metrics; "": none."""

        @functools.wraps(call)
        async def watched(request: Any, grpc_context: Any) -> Any:
            metadata = dict(grpc_context.invocation_metadata())
            carried = {key: str(metadata[key]) for key in CARRIED if key in metadata}
            about = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
            notes = self.begin(f"{service}/{name}", self._request_id(), carried, about)
            notes.fields |= {"method": "grpc", "path": f"/{service}/{name}", "dialect": dialect}
            if self._config.log_inputs:
                notes.fields["input"] = str(request)[:INPUT_CHARS]
            token = NOTES.set(notes)
            try:
                return await call(request, grpc_context)
            except BaseException as e:
                notes.error = e
                raise
            finally:
                NOTES.reset(token)
                code = grpc_context.code()
                status, number = ("OK", 0) if code is None else (code.name, code.value[0])
                if isinstance(notes.error, asyncio.CancelledError):
                    status, number = "CANCELLED", 1
                elif code is None and notes.error is not None:
                    status, number = "UNKNOWN", 2
                failed = status if status in UNFORESEEN else None
                self.end(notes, status, {"rpc.grpc.status_code": number}, failed)

        return watched

    def begin(
        self, name: str, request_id: str, carried: Mapping[str, str], attributes: Mapping[str, Any]
    ) -> RequestNotes:
        """A request has come."""
        notes = RequestNotes(known_id(request_id), time.time_ns())
        if self._spans is not None:
            self._spans.begin(notes, name, carried, attributes)
        return notes

    def end(self, notes: RequestNotes, status: int | str, attributes: Mapping[str, Any], failed: str | None) -> None:
        """A request is answered. failed: see `RequestSpans.end`."""
        ended_ns = time.time_ns()
        caller = ASKING.get()
        if caller is not None:
            notes.fields["key"] = caller.name
        if self._config.log_requests and not notes.passed_on:
            self._log(notes, status, ended_ns)
        if self._spans is not None:
            about = {f"tpray.{n}": notes.fields.get(n) for n in ("dialect", "key", "rows", "tokens", "input")}
            about["tpray.request_id"] = notes.request_id
            self._spans.end(notes, about | dict(attributes), failed, ended_ns)

    @staticmethod
    def _log(notes: RequestNotes, status: int | str, ended_ns: int) -> None:
        of = notes.fields
        fields = {name: of.get(name) for name in ("method", "path", "dialect")} | {"status": status}
        fields |= {name: of.get(name) for name in ("rows", "tokens")}
        if notes.tokenized is not None:
            began_ns, tokenized_ns = notes.tokenized
            results = [step.result for step, _ in notes.steps if step.result is not None]
            fields["tokenize_ms"] = _ms(tokenized_ns - began_ns)
            if notes.steps:
                fields["queue_ms"] = _ms(max(step.began_ns for step, _ in notes.steps) - tokenized_ns)
            if results:
                fields["compute_ms"] = _ms(max(result.compute_s for result in results) * 1e9)
        fields["total_ms"] = _ms(ended_ns - notes.began_ns)
        if notes.error is not None:
            fields["error"] = type(notes.error).__name__
        context = {"key": of.get("key"), "request_id": notes.request_id}
        if notes.span is not None and (found := notes.span.get_span_context()).is_valid:
            context["trace_id"] = f"{found.trace_id:032x}"
        log.info("request", extra={"fields": fields | context | {"input": of.get("input")}})

    def headers(self, scope: Scope, notes: RequestNotes) -> list[tuple[bytes, bytes]]:
        """A request's headers, for who passes it on: what answers it then belongs below this span."""
        if self._spans is None:
            return list(scope["headers"])
        kept = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") not in CARRIED]
        return kept + [(k.encode(), v.encode()) for k, v in self._spans.carried_by(notes.span).items()]

    @property
    def tells_inputs(self) -> bool:
        """Whether what a request sends is to be told."""
        return self._config.log_inputs

    async def flush(self) -> None:
        """Have the spans so far sent."""
        if self._spans is not None:
            await self._spans.flush()

    async def close(self) -> None:
        """Send what there is, and take no more."""
        if self._spans is not None:
            await self._spans.close()


class _Watched:
    """An ASGI application whose HTTP requests are watched."""

    def __init__(self, observer: Observer, app: Any, route_of: RouteOf | None) -> None:
        self._observer, self._app = observer, app
        self._route_of: RouteOf = route_of or (lambda _: ("", ""))
        self._passes_on = route_of is None
        self.router, self.routes = app.router, app.routes  # Serve asks for these

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, (route, dialect) = headers_of(scope), self._route_of(scope)
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        about = {"http.request.method": method, "url.path": scope["path"], "url.scheme": scope["scheme"]}
        about["network.protocol.version"] = scope.get("http_version", "1.1")
        if route:
            about["http.route"] = route
        if (agent := headers.get(b"user-agent")) is not None:
            about["user_agent.original"] = agent.decode("latin-1")
        if (host := _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))) is not None:
            about["server.address"] = host[1]
            if host[2]:
                about["server.port"] = int(host[2])
        carried = {name: headers[name.encode()].decode("latin-1") for name in CARRIED if name.encode() in headers}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        known = "HTTP" if method == "_OTHER" else method
        notes = self._observer.begin(f"{known} {route}".rstrip(), given, carried, about)
        notes.fields |= {"method": scope["method"], "path": scope["path"], "dialect": dialect}
        if self._passes_on:
            scope = {**scope, "headers": self._observer.headers(scope, notes)}
        status, sent = 0, bytearray()

        async def noted_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def noted_receive() -> Any:
            message = await receive()
            if len(sent) < INPUT_CHARS:
                sent.extend(message.get("body", b"")[:INPUT_CHARS])
            return message

        token = NOTES.set(notes)
        try:
            await self._app(scope, noted_receive if self._observer.tells_inputs else receive, noted_send)
        except BaseException as e:
            notes.error = e
            raise
        finally:
            NOTES.reset(token)
            if sent:
                notes.fields["input"] = sent.decode(errors="replace")[:INPUT_CHARS]
            status = status or (CLIENT_LEFT if isinstance(notes.error, asyncio.CancelledError) else 500)
            failed = str(status) if status >= 500 and notes.error is None else None
            if status >= 500 and notes.error is not None:
                failed = type(notes.error).__name__
            self._observer.end(notes, status, {"http.response.status_code": status}, failed)


def _ms(nanoseconds: float) -> float:
    return round(nanoseconds / 1e6, 3)
