"""OpenTelemetry spans of requests, sent by OTLP over HTTP; made of the notes (`request_notes`) once a request is over.

A request's trace has its server span, the caller's if it sends a ``traceparent``; below that ``tokenise``, and for each
attempt to run its rows ``queue`` and ``step``; below each step that was answered one ``rank`` for each rank. A step has
rows of several requests: each of these gets a copy of it in its own trace, as in Triton, with the number of requests
(``tpray.step.requests``), so that every trace is whole however the others are sampled.

A rank measures how long its program ran and waited for others; where its span lies within the step is reckoned from
when the ranks could begin, in this process. OpenTelemetry's SDK reads its own variables (``OTEL_...``).

Source: https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/semconv/ (http, rpc, exceptions),
https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tpray.config import TelemetryConfig, otlp_protocol, otlp_variable
from tpray.errors import ConfigError, GroupError
from tpray.group.daemon import on_daemon_thread
from tpray.serving.request_notes import RequestNotes, StepNotes
from tpray.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanContext

log = logging.getLogger(__name__)

FLUSH_S = 5.0
"""How long the end of a server waits for its last spans to be taken."""
CARRIED = ("traceparent", "tracestate")


def wanted(config: TelemetryConfig) -> bool:
    """Whether spans are to be sent."""
    return config.otlp_endpoint is not None or otlp_variable() is not None


def check(config: TelemetryConfig) -> None:
    """Refuse to start where spans are to be sent and cannot be.

    Raises:
        ConfigError: a package is missing, or the protocol is another one.
    """
    if not wanted(config):
        return
    asked = "--otlp-endpoint" if config.otlp_endpoint is not None else str(otlp_variable())
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ConfigError(
            f"{asked} asks for OpenTelemetry traces, and their exporter is not installed: pip install 'tpray[otel]', "
            "or set OTEL_SDK_DISABLED=true"
        )
    if config.otlp_endpoint is None and otlp_protocol() != "http/protobuf":
        raise ConfigError(
            f"{asked} is there with the protocol {otlp_protocol()}, and tpray sends http/protobuf: set "
            "OTEL_EXPORTER_OTLP_PROTOCOL to that, and the endpoint to the collector's port for it, which mostly is 4318"
        )


class RequestSpans:
    """Makes spans, and has them sent.

    Args:
        processor: takes the spans that have ended.
        with_inputs: whether what a request sent, and the words of its error, may be told.
    """

    def __init__(self, processor: SpanProcessor, with_inputs: bool = False) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        own = {"service.version": __version__, "service.instance.id": secrets.token_hex(8)}
        resource = Resource.create(own)
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):  # nobody has named it
            resource = resource.merge(Resource({SERVICE_NAME: "tpray"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._processor, self._ids = processor, RandomIdGenerator()
        self._tracer = self._provider.get_tracer("tpray", __version__)
        self._scope = InstrumentationScope("tpray", __version__)
        self._api, self._sdk = trace, sdk
        self._propagator, self._with_inputs = TraceContextTextMapPropagator(), with_inputs

    @classmethod
    def of(cls, config: TelemetryConfig) -> RequestSpans | None:
        """As configured; None: no spans are asked for.

        Raises:
            ConfigError: see `check`.
        """
        if not wanted(config):
            return None
        check(config)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        base = config.otlp_endpoint
        url = None if base is None else base if base.endswith("/v1/traces") else f"{base.rstrip('/')}/v1/traces"
        exporter = OTLPSpanExporter(endpoint=url)
        where = url or f"the endpoint of {otlp_variable()}"
        return cls(BatchSpanProcessor(once_told(exporter, where)), config.log_inputs)

    def begin(self, notes: RequestNotes, name: str, carried: Mapping[str, str], attributes: Mapping[str, Any]) -> None:
        """Begin a request's span. carried: the caller's ``traceparent`` and ``tracestate``."""
        above = self._propagator.extract(carried) if carried else None
        notes.span = self._tracer.start_span(
            name, above, self._api.SpanKind.SERVER, dict(attributes), start_time=notes.began_ns
        )

    def carried_by(self, span: Span) -> dict[str, str]:
        """What has another process's spans belong below ``span``."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return carrier

    def end(self, notes: RequestNotes, attributes: Mapping[str, Any], failed: str | None, ended_ns: int) -> None:
        """End a request's span, and make those below.

        Args:
            failed: what the server's error is called, by the conventions of the protocol; None: it is none.
        """
        span: Span = notes.span
        if not span.is_recording():
            return
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        above = span.get_span_context()
        if notes.tokenized is not None:
            self._send("tokenise", above, *notes.tokenized)
        for number, (step, waited_ns) in enumerate(notes.steps, start=1):
            self._send("queue", above, waited_ns, step.began_ns)
            self._send_step(step, number, above, step.ended_ns or ended_ns)  # it may go on, for others
        if notes.error is not None:
            span.add_event("exception", self._told_of(notes.error), ended_ns)
        if failed is not None:
            span.set_attribute("error.type", failed)
            span.set_status(self._api.Status(self._api.StatusCode.ERROR))
        span.end(ended_ns)

    def _send_step(self, step: StepNotes, number: int, above: SpanContext, ended_ns: int) -> None:
        attributes: dict[str, Any] = {
            "tpray.step.number": number,
            "tpray.step.rows": step.rows,
            "tpray.step.tokens": step.tokens,
            "tpray.step.requests": step.requests,
        }
        if step.error is not None:
            attributes["error.type"] = type(step.error).__name__
        below = self._send("step", above, step.began_ns, ended_ns, attributes, step.error)
        result = step.result
        if result is None:
            return
        began_ns = max(step.began_ns, ended_ns - int(result.total_s * 1e9))
        for rank, time in enumerate(result.ranks):
            own: dict[str, Any] = {"tpray.rank": rank, "tpray.rank.compute_s": time.compute_s}
            if time.wait_s is not None:
                own["tpray.rank.wait_s"] = time.wait_s
            self._send("rank", below, began_ns, min(ended_ns, began_ns + int(time.run_s * 1e9)), own)

    def _send(
        self,
        name: str,
        above: SpanContext,
        began_ns: int,
        ended_ns: int,
        attributes: dict[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> SpanContext:
        """Have a span sent that is over already; where it is. A tenth of what one costs that begins and ends."""
        api, sdk = self._api, self._sdk
        made = self._ids.generate_span_id()
        where: SpanContext = api.SpanContext(above.trace_id, made, False, above.trace_flags, above.trace_state)
        events = () if error is None else (sdk.Event("exception", self._told_of(error), ended_ns),)
        status = api.Status(api.StatusCode.UNSET if error is None else api.StatusCode.ERROR)
        self._processor.on_end(
            sdk.ReadableSpan(
                name, where, above, self._provider.resource, attributes, events, status=status,
                start_time=began_ns, end_time=ended_ns, instrumentation_scope=self._scope,
            )
        )  # fmt: skip
        return where

    def _told_of(self, error: BaseException) -> dict[str, str]:
        """An error's type, and its words where these are no client's, or may be told all the same."""
        told = {"exception.type": f"{type(error).__module__}.{type(error).__name__}"}
        if self._with_inputs:
            told["exception.message"] = str(error)
        elif isinstance(error, GroupError):  # which rank; after the colon comes what a program raised
            told["exception.message"] = str(error).partition(":")[0]
        return told

    async def flush(self) -> None:
        """Have the spans so far sent, if that is done soon."""
        sending = on_daemon_thread(self._provider.force_flush, "tpray-flush")
        await asyncio.wait({asyncio.wrap_future(sending)}, timeout=FLUSH_S)

    async def close(self) -> None:
        """Send what there is, if that is done soon, and end the thread that sends."""
        ending = on_daemon_thread(self._provider.shutdown, "tpray-flush")
        await asyncio.wait({asyncio.wrap_future(ending)}, timeout=FLUSH_S)


def traceparent_here() -> str | None:
    """The W3C ``traceparent`` of the span that this process's own code is in; None: it is in none."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    if not found.is_valid:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"


class _LastWords(logging.Handler):
    """Keeps what OpenTelemetry logged last, in place of the log."""

    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said = record.getMessage()


def once_told(exporter: SpanExporter, where: str) -> SpanExporter:
    """``exporter``, which says once that spans do not arrive, and once that they do again; else it logs a line a batch.

    Args:
        where: they go.
    """
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    words = _LastWords()
    vars(logging.getLogger("opentelemetry")).update(handlers=[words], propagate=False)

    class OnceTold(SpanExporter):
        lost = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = exporter.export(spans)
            if result is not SpanExportResult.SUCCESS:
                if not self.lost:
                    log.warning("spans do not reach %s and are lost until it answers: %s", where, words.said)
                self.lost += len(spans)
            elif self.lost:
                log.warning("spans reach %s again; %d were lost", where, self.lost)
                self.lost = 0
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return OnceTold()
