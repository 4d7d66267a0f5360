"""What a dialect is, and what all of them need."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from tpray.errors import DeadlineError, InputError, OverloadedError, PayloadTooLargeError
from tpray.serving.engine import Engine
from tpray.serving.haproxy_start import RENAMED_TIMEOUT_HEADER, TIMEOUT_HEADER

log = logging.getLogger(__name__)
T = TypeVar("T")

SOONER_S = 0.1
"""Where Serve reads it, as in a cluster, it answers 408 in words of its own at that time: we answer so much sooner."""


class RenderedError(NamedTuple):
    """An error as a dialect's client expects it. internal: it is a fault of the server, to be logged."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    internal: bool = False


@dataclass(frozen=True)
class Dialect:
    """One way to speak to the engine.

    name: for a person. routes: makes the routes that serve an engine. render_error: also takes starlette's
    ``HTTPException``, which a route that does not exist raises.
    """

    name: str
    routes: Callable[[Engine], APIRouter]
    render_error: Callable[[Exception], RenderedError]

    def error_response(self, error: Exception) -> Response:
        """The answer to a request that raised ``error``."""
        rendered = self.render_error(error)
        if rendered.internal:
            log.exception("a request failed", exc_info=error)
        return Response(rendered.body, rendered.status, dict(rendered.headers), media_type="application/json")


def timeout_of(request: Request, limit_s: float) -> float:
    """How long the client will wait, seconds; at most ``limit_s``, the server's own limit, which also is the default.

    Raises:
        InputError: the header is not a number of seconds above 0.
    """
    value = request.headers.get(RENAMED_TIMEOUT_HEADER, request.headers.get(TIMEOUT_HEADER))
    if value is None:
        return limit_s
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # also refuses NaN
        raise InputError(f"the header {TIMEOUT_HEADER} is {value!r}: send a number of seconds above 0, such as 2.5")
    return min(seconds, limit_s)


async def within(timeout_s: float, work: Awaitable[T]) -> T:
    """What ``work`` returns, or an error in time for the client to read it.

    Raises:
        DeadlineError: it takes longer, and was cancelled.
    """
    try:
        return await asyncio.wait_for(work, timeout_s - min(SOONER_S, timeout_s / 10))
    except asyncio.TimeoutError as e:
        raise DeadlineError(f"the request was not answered within {timeout_s:g} s") from e


def has_more_values(body: bytes | bytearray, most: int) -> bool:
    """Whether JSON has more than ``most`` values, found at the speed of a search and without making any.

    Strings, commas, brackets and braces count one each: every value has or follows one of them.
    """
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = without_escapes.split(b'"', 2 * most + 2)  # in turn what is between strings, and strings
    return len(parts) > 2 * most or len(parts) // 2 + sum(part.count(c) for part in parts[::2] for c in b",[{") > most


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

    @asynccontextmanager
    async def of(self, request: Request, limit_bytes: int, deadline: float) -> AsyncIterator[bytearray]:
        """The request's body, held until the end of the block.

        Args:
            limit_bytes: of one body; it is given up as soon as it is known to be larger.
            deadline: until when it may take to arrive; `time.monotonic` seconds.

        Raises:
            PayloadTooLargeError: the body is larger.
            OverloadedError: all bodies together are.
            DeadlineError: it did not arrive in time.
            InputError: it is compressed, or the client went away.
        """
        body = bytearray()
        try:
            await asyncio.wait_for(self._read(request, body, limit_bytes), max(0.0, deadline - time.monotonic()))
            yield body
        except asyncio.TimeoutError as e:
            raise DeadlineError("the body did not arrive in time: send less, or faster") from e
        except ClientDisconnect as e:
            raise InputError("the client went away before it had sent the body") from e
        finally:
            self.held_bytes -= _counted(body)

    async def _read(self, request: Request, body: bytearray, limit_bytes: int) -> None:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise InputError("the body has a Content-Encoding: send it as it is")
        too_large = PayloadTooLargeError(f"the body is larger than {limit_bytes} bytes: send smaller batches")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise too_large
        async for part in request.stream():
            before = _counted(body)
            body += part
            self.held_bytes += _counted(body) - before
            if len(body) > limit_bytes:
                raise too_large
            if _counted(body) and self.held_bytes > BODIES_AT_ONCE * limit_bytes:
                raise OverloadedError("the bodies that are being read are too large together: try again later")


def _counted(body: bytearray) -> int:
    return max(0, len(body) - SMALL_BODY_BYTES)
