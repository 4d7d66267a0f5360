"""What a dialect is, and what all of them need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fastapi import APIRouter, Request, Response

from tpray.errors import DeadlineError, InputError, PayloadTooLargeError
from tpray.serving.engine import Engine

log = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout-seconds"
"""How long the client will wait, from the arrival of its request; Ray Serve's name for it."""
SOONER_S = 0.1
"""Serve reads the header too, and at that time answers 408 in words of its own: we answer so much sooner."""


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
    value = request.headers.get(TIMEOUT_HEADER)
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


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The request's body, given up as soon as it is known to exceed the limit.

    Raises:
        PayloadTooLargeError: it does.
    """
    too_large = PayloadTooLargeError(f"the body is larger than {limit_bytes} bytes: send smaller batches")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)
