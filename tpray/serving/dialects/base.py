"""What a dialect is, and what all of them need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from tpray.errors import PayloadTooLargeError
from tpray.serving.engine import Engine

log = logging.getLogger(__name__)


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
