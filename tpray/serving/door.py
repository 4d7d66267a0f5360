"""What answers HTTP requests first: through the gate, and past FastAPI where a dialect answers by itself.

FastAPI documents the dialects' routes, and answers all others. Between a request and a route of its own it has some
thirty calls, which would cost more than to classify a short text with a small model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tpray.errors import MisdirectedError, StoppingError
from tpray.serving.dialects.base import Dialect, Handler, send_answer
from tpray.serving.gate import Gate


class Door:
    """The ASGI application of a replica.

    Args:
        app: answers what has no handler.
        handlers: answer ``POST``, by path.
        dialect: words the errors of requests that are not let in.
    """

    def __init__(self, app: FastAPI, handlers: Mapping[str, Handler], gate: Gate, dialect: Dialect) -> None:
        self._app, self._handlers, self._gate, self._dialect = app, handlers, gate, dialect
        # Serve asks for these, to name the route of each request in its metrics; the first that matches is it.
        self.router = app.router
        self.routes: list[Any] = [*(Route(path, app, methods=["POST"]) for path in handlers), *app.routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._gate.check(scope)
            inside = self._gate.enter()
        except (MisdirectedError, StoppingError) as e:
            await send_answer(self._dialect.answer_error(e), send)
            return
        with inside:
            handler = self._handlers.get(scope["path"]) if scope["method"] == "POST" else None
            if handler is None:
                await self._app(scope, receive, send)
            else:
                await send_answer(await handler(scope, receive), send)
