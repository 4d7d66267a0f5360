"""What a dialect is, and what all of them need."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema
from starlette.types import Receive, Scope, Send

from tpray.errors import DeadlineError, InputError, OverloadedError, PayloadTooLargeError
from tpray.serving.accepted import accepted_inputs
from tpray.serving.codec import Direction
from tpray.serving.engine import Engine
from tpray.serving.haproxy_start import RENAMED_TIMEOUT_HEADER, TIMEOUT_HEADER
from tpray.serving.model_names import ModelNames
from tpray.serving.request_notes import note_error
from tpray.serving.waiting import ClientLeftError, Waiting

log = logging.getLogger(__name__)

_TIMEOUT_HEADER, _RENAMED_TIMEOUT_HEADER = TIMEOUT_HEADER.encode(), RENAMED_TIMEOUT_HEADER.encode()

SOONER_S = 0.1
"""Where Serve reads it, as in a cluster, it answers 408 in words of its own at that time: we answer so much sooner."""


class Form(BaseModel):
    """A body, or an object in one. A key that it has not is refused by name, and not ignored; an option may be null.

    Values have the types of the schema: "1" is no number, and 1 is not true.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


Flag = bool | None
"""An option that is true or false; null: what its description says, or else false."""


def _capital(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


End = Annotated[
    Direction | None,
    BeforeValidator(_capital),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": ["Left", "Right", "left", "right"]}, {"type": "null"}]}),
]
"""Which end is cut, in upper or lower case."""

CUT = (
    "cut texts that are longer than the model takes; null: as the server's --auto-truncate says, auto_truncate in /info"
)
CUT_FROM = "which end is cut, in upper or lower case; null: Right"


class Rendered(NamedTuple):
    """An answer as a dialect's client expects it. internal: it is a fault of the server, to be logged.

    error: what was raised, for the metrics.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = {}
    internal: bool = False
    error: Exception | None = None


Handler = Callable[[Scope, Receive], Awaitable[Rendered]]
"""Answers a request, its errors too; takes what an ASGI application does."""


@dataclass(frozen=True)
class Dialect:
    """One way to speak to the engine.

    name: for a person. handlers: makes what answers ``POST``, by path. routes: documents these. pages: answers ``GET``.
    render_error: also takes starlette's ``HTTPException``, which a route that does not exist raises.
    """

    name: str
    handlers: Callable[[Answering], Mapping[str, Handler]]
    routes: Callable[[Mapping[str, Handler]], APIRouter]
    render_error: Callable[[Exception], Rendered]
    pages: Callable[[Answering], APIRouter] | None = None

    def answer_error(self, error: Exception) -> Rendered:
        """The answer to a request that raised ``error``."""
        return logged(self.render_error(error), error)


def logged(answer: Rendered, error: Exception) -> Rendered:
    """``answer`` with its error, which is noted, and logged if it is a fault of the server."""
    note_error(error)
    if answer.internal:
        log.exception("a request failed", exc_info=error)
    return answer._replace(error=error)


CLIENT_LEFT = 499
"""The status of an answer that nobody reads, for the metrics; nginx's, and Serve's own."""

Respond = Callable[[bytearray, float, Callable[[], None]], Awaitable[Rendered]]
"""Answers the body of a request until a deadline, `time.monotonic` seconds. It calls its last argument when the body is
known to be worth some work: from then on a client that leaves ends it."""


class Way(NamedTuple):
    """How a body is answered, and what that may raise."""

    respond: Respond
    answer_error: Callable[[Exception], Rendered]


ANSWERS_UNTIL = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "how long you will wait, seconds; no longer than the server's own limit",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
"""The header that every handler knows, for OpenAPI."""


def body_of(*forms: type[BaseModel]) -> dict[str, Any]:
    """A ``requestBody`` for OpenAPI, of one of these forms; whole, for there "#" is another document."""
    schemas = [form.model_json_schema() for form in forms]
    whole = [_resolved(schema, schema.pop("$defs", {})) for schema in schemas]
    schema = whole[0] if len(whole) == 1 else {"anyOf": whole}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _resolved(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_resolved(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _resolved(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _resolved(part, definitions) for name, part in schema.items()}


def as_response(answer: Rendered) -> Response:
    """An answer for FastAPI; JSON, unless its headers say otherwise."""
    return Response(answer.body, answer.status, dict(answer.headers), media_type="application/json")


async def send_answer(answer: Rendered, send: Send) -> None:
    """Send an answer over ASGI; JSON, unless its headers say otherwise."""
    headers = [(b"content-length", b"%d" % len(answer.body))]
    if "content-type" not in answer.headers:
        headers.append((b"content-type", b"application/json"))
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The headers of a request by their names in lower case; of several of one name, the first."""
    return dict(reversed(scope["headers"]))


def timeout_of(headers: Mapping[bytes, bytes], limit_s: float) -> float:
    """How long the client will wait, seconds; at most ``limit_s``, the server's own limit, which also is the default.

    Raises:
        InputError: the header is not a number of seconds above 0.
    """
    value = headers.get(_RENAMED_TIMEOUT_HEADER, headers.get(_TIMEOUT_HEADER))
    if value is None:
        return limit_s
    said = value.decode("latin-1")
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # also refuses NaN
        raise InputError(f"the header {TIMEOUT_HEADER} is {said!r}: send a number of seconds above 0, such as 2.5")
    return min(seconds, limit_s)


def sooner(timeout_s: float) -> float:
    """How long a request may take that is to be answered in time for the client to read it."""
    return timeout_s - min(SOONER_S, timeout_s / 10)


def has_more_values(body: bytes | bytearray, most: int) -> bool:
    """Whether JSON has more than ``most`` values, found at the speed of a search and without making any.

    Strings, commas, brackets and braces count one each: every value has or follows one of them.
    """
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = without_escapes.split(b'"', 2 * most + 2)  # in turn what is between strings, and strings
    return len(parts) > 2 * most or len(parts) // 2 + sum(part.count(c) for part in parts[::2] for c in b",[{") > most


def check_size(count: int, most: int, name: str) -> None:
    """Refuse more items than a request may have.

    Args:
        name: of the list that has them.

    Raises:
        PayloadTooLargeError: with both figures.
    """
    if count > most:
        raise PayloadTooLargeError(f"`{name}` has {count} items and the limit is {most}: send smaller batches")


BODIES_AT_ONCE = 8
"""How many bodies of the greatest size may be held at once; of smaller ones, as many as are no larger together."""

SMALL_BODY_BYTES = 32_768
"""So much of each body is not counted there: large ones do not keep small ones out."""


class Bodies:
    """The bodies of the requests that are being read or answered, which are bounded together.

    held_bytes: how large they are now, without `SMALL_BODY_BYTES` of each.
    """

    def __init__(self) -> None:
        self.held_bytes = 0

    @contextmanager
    def holding(self, size: int, limit_bytes: int) -> Iterator[None]:
        """Hold a body of ``size`` bytes that has come otherwise, for the time of a block.

        Raises:
            PayloadTooLargeError, OverloadedError: as `read`.
        """
        if size > limit_bytes:
            raise PayloadTooLargeError(f"the request is larger than {limit_bytes} bytes: send smaller batches")
        counted = max(0, size - SMALL_BODY_BYTES)
        self.held_bytes += counted
        try:
            self._check_room(counted, limit_bytes)
            yield
        finally:
            self.held_bytes -= counted

    def _check_room(self, counted: int, limit_bytes: int) -> None:
        if counted and self.held_bytes > BODIES_AT_ONCE * limit_bytes:
            raise OverloadedError("the bodies that are being read are too large together: try again later")

    def drop(self, body: bytearray) -> None:
        """The body is needed no longer; for every one that `read` was given."""
        self.held_bytes -= _counted(body)

    async def read(self, body: bytearray, headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int) -> None:
        """Add to ``body``, which is held until `drop`, what a request sends.

        Args:
            limit_bytes: of one body; it is given up as soon as it is known to be larger.

        Raises:
            PayloadTooLargeError: the body is larger.
            OverloadedError: all bodies together are.
            InputError: it is compressed, or the client went away.
        """
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise InputError("the body has a Content-Encoding: send it as it is")
        too_large = f"the body is larger than {limit_bytes} bytes: send smaller batches"
        declared = headers.get(b"content-length", b"0").decode("latin-1")
        if declared.isdecimal() and float(declared) > limit_bytes:  # Python's int takes 4300 digits at most
            raise PayloadTooLargeError(too_large)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise InputError("the client went away before it had sent the body")
            before = _counted(body)
            body += message.get("body", b"")
            more = message.get("more_body", False)
            self.held_bytes += _counted(body) - before
            if len(body) > limit_bytes:
                raise PayloadTooLargeError(too_large)
            self._check_room(_counted(body), limit_bytes)


def _counted(body: bytearray) -> int:
    return max(0, len(body) - SMALL_BODY_BYTES)


class Answering:
    """Makes handlers of what answers bodies, for one engine; what they read is bounded together.

    names: what its model is called. accepts: which kinds of input it takes.
    """

    def __init__(self, engine: Engine, served: tuple[str, ...] = ()) -> None:
        self.engine, self._bodies, self._waiting = engine, Bodies(), Waiting()
        self.names = ModelNames(served, engine.codec.record.source)
        self.accepts = accepted_inputs(engine.codec, engine.group.artifact.model_directory)

    def handler(self, way_of: Callable[[bytearray], Way]) -> Handler:
        """A handler that reads a body, bounded in size and time, and answers it. way_of: also takes a part of one."""

        async def handle(scope: Scope, receive: Receive) -> Rendered:
            headers, limits, body = headers_of(scope), self.engine.config, bytearray()
            try:
                timeout_s = timeout_of(headers, limits.request_timeout_s)
                now = time.monotonic()
                late = DeadlineError(f"the request was not answered within {timeout_s:g} s")
                with self._waiting.until(now + sooner(timeout_s), late) as block:
                    await self._bodies.read(body, headers, receive, limits.payload_limit_bytes)
                    return await way_of(body).respond(body, now + timeout_s, lambda: block.listen(receive))
            except ClientLeftError as e:
                return logged(Rendered(CLIENT_LEFT, b""), e)
            except Exception as e:  # noqa: BLE001  # the one boundary where errors become statuses
                return way_of(body).answer_error(e)
            finally:
                self._bodies.drop(body)

        return handle
