"""The Open Inference Protocol, version 2, over HTTP: what KServe's and Triton's clients ask under ``/v2``.

Source: https://github.com/kserve/open-inference-protocol (specification/protocol/inference_rest.md), and Triton's
extensions for binary tensor data and classification. Deliberate differences: ready runs a step; what is not known is
refused by name, and not ignored; there is one version, 1. What is computed is in `open_infer`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from tpray.errors import (
    DeadlineError,
    EmptyInputError,
    GroupError,
    InputError,
    MisdirectedError,
    OverloadedError,
    PayloadTooLargeError,
    StoppingError,
    UnauthorizedError,
    UnknownModelError,
    UnsupportedTaskError,
)
from tpray.serving.dialects import tei
from tpray.serving.dialects.base import (
    ANSWERS_UNTIL,
    Answering,
    Dialect,
    Handler,
    Rendered,
    Way,
    as_response,
    body_of,
    has_more_values,
    headers_of,
)
from tpray.serving.dialects.open_forms import (
    IN_PATH,
    INFER,
    JSON_BYTES,
    LIVE,
    MODEL,
    PLATFORM,
    READY,
    ROOT,
    VERSIONED,
    ErrorResponse,
    InferRequest,
    InferResponse,
    InputTensor,
)
from tpray.serving.dialects.open_infer import (
    EXTENSIONS,
    ITEMS,
    TO_CUT,
    TOKENS,
    VERSION,
    Inferred,
    Output,
    Wanted,
    check_model,
    infer,
    inputs_of,
    outputs_of,
)
from tpray.serving.dialects.open_tensors import Tensor, from_elements, from_raw, to_raw
from tpray.serving.engine import Engine
from tpray.serving.model_names import ModelNames
from tpray.version import __version__

ERRORS: tuple[tuple[type[Exception], int], ...] = (
    (UnknownModelError, 404),
    (PayloadTooLargeError, 413),
    (InputError, 400),
    (MisdirectedError, 421),
    (UnauthorizedError, 401),
    (OverloadedError, 429),
    (StoppingError, 503),
    (GroupError, 503),
    (DeadlineError, 504),
    (Exception, 500),
)
"""From errors to statuses; the first that matches."""


class Tensors:
    """The binary tensor data of a body, of which each input takes its part in turn."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, name: str, size: Any) -> memoryview:
        """The next ``size`` bytes, which are the input's."""
        if type(size) is not int or size < 0:
            raise InputError(f"input `{name}`: binary_data_size is {size!r}: send a number of bytes")
        end = self._at + size
        if end > len(self._data):
            raise InputError(
                f"input `{name}`: binary_data_size is {size}, and of the binary data {len(self._data) - self._at} "
                "bytes are left"
            )
        part, self._at = self._data[self._at : end], end
        return part

    def check_all_taken(self) -> None:
        """Refuse bytes that no input has."""
        if self._at < len(self._data):
            raise InputError(f"{len(self._data) - self._at} bytes of the binary data are no input's")


def split(body: bytearray, json_bytes: bytes | None) -> tuple[memoryview, memoryview]:
    """The JSON of a body, and the binary tensor data after it."""
    whole = memoryview(body)
    if json_bytes is None:
        return whole, whole[len(whole) :]
    said = json_bytes.decode("latin-1")
    if not said.isdecimal() or len(said) > 12 or int(said) > len(whole):
        raise InputError(
            f"the header Inference-Header-Content-Length is {said!r}: send how many of the body's {len(whole)} bytes "
            "are JSON"
        )
    return whole[: int(said)], whole[int(said) :]


def read(text: bytes, engine: Engine) -> InferRequest:
    """The request in JSON.

    Raises:
        InputError: it is not of the form; the message says where. PayloadTooLargeError: it has too many values.
    """
    if not text or text.isspace():
        raise EmptyInputError('the body is empty: send JSON such as {"inputs": [...]}')
    rows = engine.config.max_client_batch_size
    most = tei.OTHER_VALUES + rows * len(TOKENS) * (2 + engine.codec.max_length)
    if len(text) > most and has_more_values(text, most):
        raise PayloadTooLargeError(
            f"the body has too many values for the limit of {rows} rows: send smaller batches, or binary tensor data"
        )
    try:
        return InferRequest.model_validate_json(text)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            said = f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
            raise InputError(said) from e
        where = ".".join(map(str, first["loc"])) or "the body"
        if first["type"] == "extra_forbidden":
            raise InputError(f"`{where}` is not known here: leave it out") from e
        raise InputError(f"`{where}`: {first['msg'][:1].lower()}{first['msg'][1:]}") from e


def _tensor(each: InputTensor, binary: Tensors) -> Tensor:
    unknown = next((name for name in each.parameters if name != "binary_data_size"), None)
    if unknown is not None:
        raise InputError(f"input `{each.name}`: the parameter `{unknown}` is not known here: leave it out")
    if "binary_data_size" in each.parameters:
        if each.data is not None:
            raise InputError(f"input `{each.name}` has both data and binary_data_size: send one of them")
        return from_raw(
            each.name, each.datatype, each.shape, binary.take(each.name, each.parameters["binary_data_size"])
        )
    if each.data is None:
        raise InputError(f"input `{each.name}` has no data: send data, or binary_data_size and bytes after the JSON")
    return from_elements(each.name, each.datatype, each.shape, each.data)


def _flag(where: str, parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{where}`{name}` is {value!r}: send true or false")
    return value


def _wanted(asked: InferRequest) -> tuple[list[Wanted], list[bool]]:
    """The outputs that are asked for, and which of them go after the JSON; of none, whether all do."""
    binary = _flag("the parameter ", asked.parameters, "binary_data_output", False)
    outputs = []
    for each in asked.outputs or ():
        unknown = next((name for name in each.parameters if name not in ("classification", "binary_data")), None)
        if unknown is not None:
            raise InputError(f"output `{each.name}`: the parameter `{unknown}` is not known here: leave it out")
        classes = each.parameters.get("classification", 0)
        if type(classes) is not int:
            raise InputError(f"output `{each.name}`: classification is {classes!r}: send a number of labels")
        outputs.append(
            (Wanted(each.name, classes), _flag(f"output `{each.name}`: ", each.parameters, "binary_data", binary))
        )
    return [wanted for wanted, _ in outputs], [after for _, after in outputs] or [binary]


def render(answer: Inferred, name: str, request_id: str | None, after_json: Sequence[bool]) -> Rendered:
    """A successful answer."""
    raw: list[bytes] = []

    def rendered(output: Output, after: bool) -> dict[str, Any]:
        said = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if not after:
            values = output.values
            return said | {"data": values if isinstance(values, list) else values.ravel().tolist()}
        raw.append(to_raw(output.values))
        return said | {"parameters": {"binary_data_size": len(raw[-1])}}

    same = len(after_json) == 1
    outputs = [rendered(each, after_json[0 if same else number]) for number, each in enumerate(answer.outputs)]
    said = {"model_name": name, "model_version": VERSION} | ({} if request_id is None else {"id": request_id})
    text = json.dumps(said | {"outputs": outputs}, ensure_ascii=False).encode()
    headers = tei.timing_headers(answer)
    if raw:
        headers |= {JSON_BYTES: str(len(text)), "content-type": "application/octet-stream"}
    return Rendered(200, b"".join([text, *raw]), headers)


def render_error(error: Exception) -> Rendered:
    """Status, body and headers for an error; in TEI's words."""
    known = tei.render_error(error)
    status = known.status
    if not isinstance(error, HTTPException):
        status = next(status for cls, status in ERRORS if isinstance(error, cls))
    body = json.dumps({"error": tei.sentence_of(error, ITEMS, TO_CUT)}, ensure_ascii=False).encode()
    return known._replace(status=status, body=body)


def model_of(scope: Scope, names: ModelNames) -> str:
    """The model that the path names.

    Raises:
        UnknownModelError: as `check_model`.
    """
    name = str(scope["path_params"]["model"])
    check_model(names, name, scope["path_params"].get("version", ""))
    return name


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests, once the path was taken apart."""
    engine, names = answering.engine, answering.names

    async def answer(scope: Scope, body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        name = model_of(scope, names)
        text, data = split(body, headers_of(scope).get(JSON_BYTES.encode()))
        asked = read(bytes(text), engine)
        binary = Tensors(data)
        tensors = [_tensor(each, binary) for each in asked.inputs]
        binary.check_all_taken()
        wanted, after_json = _wanted(asked)
        parameters = {key: value for key, value in asked.parameters.items() if key != "binary_data_output"}
        answer = await infer(engine, tensors, wanted, parameters, deadline, worth)
        return render(answer, name, asked.id, after_json)

    async def handle(scope: Scope, receive: Receive) -> Rendered:
        way = Way(partial(answer, scope), DIALECT.answer_error)
        return await answering.handler(lambda _: way)(scope, receive)

    return dict.fromkeys((VERSIONED + INFER, MODEL + INFER), handle)  # the one with more in it first


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The routes that infer, as FastAPI documents them; the handlers need the path's parameters, which it finds."""
    router = APIRouter()

    async def infer(request: Request) -> Response:
        """Classify texts or rows of tokens (the Open Inference Protocol: KServe's and Triton's dialect)."""
        return as_response(await answering[MODEL + INFER](request.scope, request.receive))

    for path, what in ((VERSIONED + INFER, "version"), (MODEL + INFER, "model")):
        router.post(
            path,
            operation_id=f"infer_{what}",
            response_model=InferResponse,
            responses={status: {"model": ErrorResponse} for _, status in ERRORS},
            openapi_extra={"requestBody": body_of(InferRequest), "parameters": [*IN_PATH[what], ANSWERS_UNTIL]},
        )(infer)
    return router


def metadata(name: str, engine: Engine) -> dict[str, Any]:
    """What a client is told of the model."""

    def described(tensors: Sequence[tuple[str, str, list[int]]]) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in tensors]

    record = engine.codec.record
    return {
        "name": name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": described(inputs_of(record)),
        "outputs": described(outputs_of(record)),
    }


def pages(answering: Answering) -> APIRouter:
    """The routes about the server and its model."""
    router, engine, names = APIRouter(), answering.engine, answering.names
    failures: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}}

    def page(path: str, name: str, answer: Callable[[Request], Awaitable[Any]], does: str, **about: Any) -> None:
        """``GET`` what ``answer`` gives; its errors are this dialect's."""

        async def get(request: Request) -> Response:
            try:
                said = await answer(request)
            except Exception as e:  # noqa: BLE001  # the boundary where errors become statuses
                return as_response(DIALECT.answer_error(e))
            return as_response(Rendered(200, json.dumps(said).encode()))

        router.get(path, operation_id=name, description=does, **about)(get)

    async def server(request: Request) -> dict[str, Any]:
        return {"name": PLATFORM, "version": __version__, "extensions": list(EXTENSIONS)}

    async def live(request: Request) -> dict[str, Any]:
        return {"live": True}

    async def ready(request: Request) -> dict[str, Any]:
        await engine.check()
        return {"ready": True}

    async def model_ready(request: Request) -> dict[str, Any]:
        name = model_of(request.scope, names)
        return {"name": name} | await ready(request)

    async def model(request: Request) -> dict[str, Any]:
        return metadata(model_of(request.scope, names), engine)

    async def no_get(request: Request) -> None:
        raise HTTPException(405, headers={"allow": "POST"})

    async def absent(request: Request) -> None:
        raise UnsupportedTaskError("a model has no configuration, statistics or settings here: ask for /info")

    unready: dict[int | str, dict[str, Any]] = {503: {"model": ErrorResponse}}
    page(ROOT, "server_metadata", server, "What this server is (the Open Inference Protocol).")
    page(LIVE, "server_live", live, "200: the server answers.")
    page(READY, "server_ready", ready, "200: every rank has just answered a step.", responses=unready)
    for path, what in ((VERSIONED, "version"), (MODEL, "model")):
        own = {"openapi_extra": {"parameters": IN_PATH[what]}, "responses": failures}
        for absent_path in ("config", "stats", "trace/setting"):
            page(f"{path}/{absent_path}", f"{what}_{absent_path}", absent, "", include_in_schema=False)
        page(path + INFER, f"{what}_infer", no_get, "", include_in_schema=False)
        page(
            f"{path}/ready", f"{what}_ready", model_ready, "200: every rank has just answered a step.",
            openapi_extra=own["openapi_extra"], responses=failures | unready,
        )  # fmt: skip
        page(path, f"{what}_metadata", model, "The model's inputs and outputs.", **own)
    return router


DIALECT = Dialect("Open Inference Protocol", handlers, routes, render_error, pages)
