"""The methods of GRPCInferenceService and of grpc.health.v1.Health; Ray Serve calls them on the deployment by name.

Each takes a request and the call's context, of which it sets code and details where something is wrong, in the
sentences that HTTP has. A client's deadline needs no code: gRPC cancels the call, and with it what waits for a step.

Source: https://github.com/kserve/open-inference-protocol (inference_grpc.md), https://github.com/grpc/grpc
(doc/health-checking.md), ray/serve/_private/replica.py of Ray 2.60 (``grpc_context``).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tpray.errors import (
    DeadlineError,
    GroupError,
    InputError,
    MisdirectedError,
    OverloadedError,
    PayloadTooLargeError,
    StoppingError,
    UnauthorizedError,
    UnknownModelError,
)
from tpray.serving.access import Access
from tpray.serving.dialects.base import Bodies, logged
from tpray.serving.dialects.open_forms import LIVE, PLATFORM, READY
from tpray.serving.dialects.open_infer import (
    EXTENSIONS,
    ITEMS,
    TO_CUT,
    VERSION,
    Inferred,
    Wanted,
    check_model,
    infer,
    inputs_of,
    outputs_of,
)
from tpray.serving.dialects.open_tensors import Tensor, from_elements, from_raw, to_raw
from tpray.serving.dialects.tei import render_error, sentence_of
from tpray.serving.door import NONE
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.keys import ASKING
from tpray.serving.model_names import ModelNames
from tpray.serving.waiting import ClientLeftError
from tpray.version import __version__

if TYPE_CHECKING:
    from tpray.serving.oip import open_inference_pb2 as messages

SERVICE = "inference.GRPCInferenceService"
GRPC = "Open Inference Protocol, gRPC"
"""The dialect of calls that classify, in the metrics."""
CODES: tuple[tuple[type[Exception], str], ...] = (
    (UnknownModelError, "NOT_FOUND"),
    (PayloadTooLargeError, "RESOURCE_EXHAUSTED"),
    (InputError, "INVALID_ARGUMENT"),
    (UnauthorizedError, "UNAUTHENTICATED"),
    (OverloadedError, "RESOURCE_EXHAUSTED"),
    (MisdirectedError, "UNAVAILABLE"),
    (StoppingError, "UNAVAILABLE"),
    (GroupError, "UNAVAILABLE"),
    (DeadlineError, "DEADLINE_EXCEEDED"),
    (Exception, "INTERNAL"),
)
"""From errors to gRPC's codes; the first that matches."""

DETAILS_CHARS = 2000
"""Longer sentences are cut: gRPC has 8 KB for all that goes with a code."""

CONTENTS = {"BYTES": "bytes_contents", "INT64": "int64_contents", "INT32": "int_contents"}
"""Where the typed contents of a datatype are."""


class Context(Protocol):
    """What is used of a call's context, Serve's or grpcio's own."""

    def invocation_metadata(self) -> Any: ...
    def set_code(self, code: Any) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


class OpenInferenceService:
    """The methods, for one engine; a deployment that inherits them calls `open_service` once its engine has started."""

    def open_service(self, engine: Engine, gate: Gate, names: ModelNames, access: Access) -> None:
        """From now on answer with ``engine`` what comes through ``gate``, by those who may ask."""
        self._served, self._way_in, self._names, self._asking = engine, gate, names, access
        self._bodies = Bodies()

    @cached_property
    def _messages(self) -> Any:
        """The module of messages, for those who are asked over gRPC."""
        from tpray.serving.oip import open_inference_pb2

        return open_inference_pb2

    async def _answer(
        self, context: Context, work: Callable[[], Awaitable[Any]], failed: Any, path: str = "", dialect: str = NONE
    ) -> Any:
        """What ``work`` gives to a request that is let in; ``failed`` with a code if it raises.

        Args:
            path: what the same is over HTTP, with GET, and may be open; "": it is not. dialect: in the metrics.
        """
        started, code = time.perf_counter(), "CANCELLED"
        error: Exception | None = ClientLeftError()
        ASKING.set(None)  # whoever asked before in this context
        try:
            self._let_in(context, path)
            with self._way_in.enter():
                answer = await work()
            code, error = "OK", None
            return answer
        except Exception as e:  # noqa: BLE001  # the one boundary where errors become codes
            code, error = _explain(e, context), e
            return failed
        finally:
            caller = ASKING.get()
            key, seconds = "" if caller is None else caller.name, time.perf_counter() - started
            self._served.load.answered(dialect, code, key, seconds, error)

    def _let_in(self, context: Context, path: str) -> None:
        """Refuse a request that shows no right to be here; the place for all of that, by what HTTP would show."""
        headers = [
            (name.encode(), value if isinstance(value, bytes) else value.encode("latin-1", "replace"))
            for name, value in context.invocation_metadata()
        ]
        scope = {"type": "http", "method": "GET" if path else "POST", "path": path or f"/{SERVICE}", "headers": headers}
        self._way_in.check(scope)
        self._asking.check(scope)

    async def _is_ready(self) -> bool:
        try:
            await self._served.check()
        except GroupError:
            return False
        return True

    async def ServerLive(self, request: Any, grpc_context: Context) -> messages.ServerLiveResponse:
        """Whether the server answers."""

        async def work() -> Any:
            return self._messages.ServerLiveResponse(live=True)

        return await self._answer(grpc_context, work, self._messages.ServerLiveResponse(), LIVE)

    async def ServerReady(self, request: Any, grpc_context: Context) -> messages.ServerReadyResponse:
        """Whether every rank has just answered a step."""

        async def work() -> Any:
            return self._messages.ServerReadyResponse(ready=await self._is_ready())

        return await self._answer(grpc_context, work, self._messages.ServerReadyResponse(), READY)

    async def ModelReady(
        self, request: messages.ModelReadyRequest, grpc_context: Context
    ) -> messages.ModelReadyResponse:
        """The same, of a model that is here."""

        async def work() -> Any:
            check_model(self._names, request.name, request.version)
            return self._messages.ModelReadyResponse(ready=await self._is_ready())

        return await self._answer(grpc_context, work, self._messages.ModelReadyResponse())

    async def ServerMetadata(self, request: Any, grpc_context: Context) -> messages.ServerMetadataResponse:
        """What this server is."""

        async def work() -> Any:
            return self._messages.ServerMetadataResponse(name=PLATFORM, version=__version__, extensions=EXTENSIONS[1:])

        return await self._answer(grpc_context, work, self._messages.ServerMetadataResponse())

    async def ModelMetadata(
        self, request: messages.ModelMetadataRequest, grpc_context: Context
    ) -> messages.ModelMetadataResponse:
        """The model's inputs and outputs."""
        made = self._messages.ModelMetadataResponse

        async def work() -> Any:
            check_model(self._names, request.name, request.version)
            record = self._served.codec.record
            described = [
                [made.TensorMetadata(name=name, datatype=datatype, shape=shape) for name, datatype, shape in tensors]
                for tensors in (inputs_of(record), outputs_of(record))
            ]
            return made(
                name=request.name, versions=[VERSION], platform=PLATFORM, inputs=described[0], outputs=described[1]
            )

        return await self._answer(grpc_context, work, made())

    async def ModelInfer(
        self, request: messages.ModelInferRequest, grpc_context: Context
    ) -> messages.ModelInferResponse:
        """Classify texts or rows of tokens."""

        async def work() -> Any:
            engine = self._served
            with self._bodies.holding(request.ByteSize(), engine.config.payload_limit_bytes):
                check_model(self._names, request.model_name, request.model_version)
                deadline = time.monotonic() + engine.config.request_timeout_s
                answer = await infer(engine, _tensors(request), _wanted(request), _values(request.parameters), deadline)
                return self._rendered(answer, request)

        return await self._answer(grpc_context, work, self._messages.ModelInferResponse(), dialect=GRPC)

    def _rendered(self, answer: Inferred, request: messages.ModelInferRequest) -> messages.ModelInferResponse:
        """Raw contents for those who send them, and for those who send typed ones these."""
        made = self._messages.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
        for output in answer.outputs:
            tensor = made.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            if request.raw_input_contents:
                made.raw_output_contents.append(to_raw(output.values))
            elif isinstance(output.values, list):
                tensor.contents.bytes_contents.extend(value.encode() for value in output.values)
            else:
                tensor.contents.fp32_contents.extend(output.values.ravel())
        return made

    async def ModelConfig(self, request: Any, grpc_context: Context) -> messages.ModelConfigResponse:
        """Triton's; there is none here."""
        _refuse(grpc_context, "a model has no configuration here: ask for ModelMetadata, or for /info over HTTP")
        return self._messages.ModelConfigResponse()

    async def ModelStatistics(self, request: Any, grpc_context: Context) -> messages.ModelStatisticsResponse:
        """Triton's; there are none here."""
        _refuse(grpc_context, "a model has no statistics here: ask for /metrics over HTTP")
        return self._messages.ModelStatisticsResponse()

    async def Check(self, request: Any, grpc_context: Context) -> Any:
        """grpc.health.v1: whether every rank has just answered a step."""
        from grpc_health.v1.health_pb2 import HealthCheckResponse

        if request.service not in ("", SERVICE):
            _set_code(grpc_context, "NOT_FOUND", f"there is no service {request.service!r} here: there is {SERVICE}")
            return HealthCheckResponse()

        async def work() -> Any:
            ready = await self._is_ready()
            return HealthCheckResponse(status=HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING)

        return await self._answer(grpc_context, work, HealthCheckResponse(), READY)

    async def Watch(self, request: Any, grpc_context: Context) -> AsyncIterator[Any]:
        """grpc.health.v1: not here, since a stream without an end would keep a replica from stopping."""
        _refuse(grpc_context, "health is not streamed here: ask for Check again and again")
        return
        yield  # which makes it a stream


def _tensors(request: messages.ModelInferRequest) -> list[Tensor]:
    raw, inputs = request.raw_input_contents, request.inputs
    if raw and len(raw) != len(inputs):
        raise InputError(f"there are {len(inputs)} inputs and {len(raw)} raw_input_contents: send one for each input")
    tensors = []
    for number, each in enumerate(inputs):
        unknown = next(iter(each.parameters), None)
        if unknown is not None:
            raise InputError(f"input `{each.name}`: the parameter `{unknown}` is not known here: leave it out")
        if raw:
            if each.HasField("contents"):
                raise InputError(f"input `{each.name}` has contents beside raw_input_contents: send one of them")
            tensors.append(from_raw(each.name, each.datatype, list(each.shape), raw[number]))
            continue
        field = CONTENTS.get(each.datatype, "")
        others = [named.name for named, _ in each.contents.ListFields() if named.name != field]
        if field and others:
            raise InputError(f"input `{each.name}` is {each.datatype} and has {others[0]}: send {field}")
        data = list(getattr(each.contents, field)) if field else []
        tensors.append(from_elements(each.name, each.datatype, list(each.shape), data))
    return tensors


def _wanted(request: messages.ModelInferRequest) -> list[Wanted]:
    wanted = []
    for each in request.outputs:
        said = _values(each.parameters)
        classes = said.pop("classification", 0)
        if said:
            raise InputError(
                f"output `{each.name}`: the parameter `{next(iter(said))}` is not known here: leave it out"
            )
        if type(classes) is not int:
            raise InputError(f"output `{each.name}`: classification is {classes!r}: send a number of labels")
        wanted.append(Wanted(each.name, classes))
    return wanted


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as Python has them; None: there is no value."""
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: choice and getattr(parameters[name], choice) for name, choice in chosen.items()}


def _explain(error: Exception, context: Context) -> str:
    """Set the code of an error, and its sentence; when to try again goes along. Returned is the code."""
    known = logged(render_error(error), error)
    code = next(code for cls, code in CODES if isinstance(error, cls))
    _set_code(context, code, sentence_of(error, ITEMS, TO_CUT))
    if known.headers:
        context.set_trailing_metadata(list(known.headers.items()))
    return code


def _refuse(context: Context, details: str) -> None:
    _set_code(context, "UNIMPLEMENTED", details)


def _set_code(context: Context, code: str, details: str) -> None:
    import grpc

    context.set_code(getattr(grpc.StatusCode, code))
    context.set_details(details[:DETAILS_CHARS])
