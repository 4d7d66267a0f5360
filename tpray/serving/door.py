"""What answers HTTP requests first: through the gate, with a key, and past FastAPI where a dialect answers by itself.

FastAPI documents the dialects' routes, and answers all others. Between a request and a route of its own it has some
thirty calls, which would cost more than to classify a short text with a small model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette._utils import get_route_path  # that by which Starlette's routers find a route
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from tpray.errors import MisdirectedError, RateLimitError, StoppingError, UnauthorizedError
from tpray.serving.access import Access
from tpray.serving.answers import Timing
from tpray.serving.dialects.base import CLIENT_LEFT, Dialect, Handler, Rendered, send_answer
from tpray.serving.dialects.tei import timing_headers
from tpray.serving.gate import Gate
from tpray.serving.keys import ASKING
from tpray.serving.load import Load
from tpray.serving.waiting import ClientLeftError

NONE = "none"
"""The dialect of what no dialect classifies: routes about the server and its model, and paths that there are not."""

_LEFT = Rendered(CLIENT_LEFT, b"", error=ClientLeftError())
"""For the metrics: Serve has cancelled the request, for nobody waits for it any more."""


class Door:
    """The ASGI application of a replica.

    Args:
        app: answers what has no handler.
        handlers: answer ``POST``, by path, with or without a slash at its end; ``{name}`` in one is as in starlette's.
        spoken: the routes of each dialect, which words the errors of requests to these that are not let in; the first
            words those of others.
        access: who may ask.
        streams: answer ``GET``, by path, until the gate is closed; so they are not waited for then.
        load: takes note of each request that was answered; not of streams.
    """

    def __init__(
        self,
        app: FastAPI,
        handlers: Mapping[str, Handler],
        gate: Gate,
        spoken: Sequence[tuple[Dialect, Sequence[Any]]],
        access: Access,
        streams: Mapping[str, ASGIApp],
        load: Load,
    ) -> None:
        self._app, self._gate, self._spoken, self._access, self._load = app, gate, spoken, access, load
        dialects = {route.path: dialect.name for dialect, routes in reversed(spoken) for route in routes}
        named = {path: (dialects[path], handler) for path, handler in handlers.items()}
        self._handlers = {path: handler for path, handler in named.items() if "{" not in path}
        self._patterns = [(compile_path(path)[0], handler) for path, handler in named.items() if "{" in path]
        self._streams = streams
        # Serve asks for these, to name the route of each request in its metrics; the first that matches is it.
        self.router = app.router
        own = [*((path, "POST") for path in handlers), *((path, "GET") for path in self._streams)]
        self.routes: list[Any] = [*(Route(path, app, methods=[method]) for path, method in own), *app.routes]
        self._known = {route.path: "" for route in self.routes if isinstance(route, Route)}
        self._known |= {path: dialect for path, (dialect, _) in named.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        method, path = scope.get("method"), get_route_path(scope)  # behind the application's prefix
        name, handler = (self._handler_of(path, scope) if method == "POST" else None) or (NONE, None)
        try:
            self._gate.check(scope)
            self._access.check(scope)
            inside = self._gate.enter()
        except (MisdirectedError, RateLimitError, StoppingError, UnauthorizedError) as e:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})  # a policy is violated: RFC 6455
            else:
                if isinstance(e, MisdirectedError):
                    ASKING.set(None)  # whoever asked before in this context
                refused = refusal(self._dialect_of(scope), e)
                self._note(name, refused, started)
                await send_answer(refused, send)
            return
        if method == "GET" and (stream := self._streams.get(path)) is not None:
            await stream(scope, receive, send)
            return
        with inside:
            if handler is None:
                await self._ask_app(scope, receive, send, started)
                return
            try:
                answer = await handler(scope, receive)
            except asyncio.CancelledError:
                self._note(name, _LEFT, started)
                raise
            self._note(name, answer, started)
            await send_answer(answer, send)

    def _note(self, dialect: str, answer: Rendered, started: float) -> None:
        """A request is answered. Before it is sent: who has read it finds it counted."""
        caller = ASKING.get() if self._access.keys else None
        key = "" if caller is None else caller.name
        self._load.answered(dialect, answer.status, key, time.perf_counter() - started, answer.error)

    async def _ask_app(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        noted = scope["type"] != "http"

        async def noting(message: Any) -> None:
            nonlocal noted
            if message["type"] == "http.response.start":
                self._note(NONE, Rendered(message["status"], b""), started)
                noted = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if not noted:
                self._note(NONE, _LEFT, started)
            raise

    def _handler_of(self, path: str, scope: Scope) -> tuple[str, Handler] | None:
        """The handler of a path, and its dialect; the path's parameters come into the scope's ``path_params``."""
        if (handler := self._handlers.get(path)) is not None:
            return handler
        if path.endswith("/") and path != "/":  # starlette would redirect, and not every client sends its body again
            return self._handler_of(path.rstrip("/") or "/", scope)
        for pattern, named in self._patterns:
            if (found := pattern.match(path)) is not None:
                scope["path_params"] = found.groupdict()
                return named
        return None

    def route_of(self, scope: Scope) -> tuple[str, str]:
        """The path of the route that a request is for, with ``{name}`` for what varies; "": there is none.

        And the dialect that it counts for in the metrics; "": `NONE`.
        """
        path = get_route_path(scope)
        if path not in self._known:
            path = path.rstrip("/") or "/"
        if path not in self._known:
            varying = (r for _, routes in self._spoken for r in routes if "{" in r.path)
            path = next((str(r.path) for r in varying if r.matches(scope)[0] != Match.NONE), "")
        return path, self._known.get(path, "") if scope["method"] == "POST" else ""

    def _dialect_of(self, scope: Scope) -> Dialect:
        """Whose route it is, with whatever method; of nobody's the first."""
        speak = (dialect for dialect, routes in self._spoken if any(r.matches(scope)[0] != Match.NONE for r in routes))
        return next(speak, self._spoken[0][0])


def refusal(dialect: Dialect, error: Exception) -> Rendered:
    """An error in a dialect's words; one for want of a key asks for it, whatever the dialect says."""
    answer = dialect.answer_error(error)
    if isinstance(error, UnauthorizedError):
        return answer._replace(status=401, headers={**answer.headers, "www-authenticate": "Bearer"})
    return answer


def shared(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app`` for pages of these origins, its errors too: https://fetch.spec.whatwg.org/#http-cors-protocol."""
    exposed = [*timing_headers(Timing(0, 0, 0, 0, 0)), "retry-after", "www-authenticate"]
    return CORSMiddleware(app, origins, ("GET", "HEAD", "POST"), allow_headers=["*"], expose_headers=exposed)


class SharedDoor(Door):
    """A door that pages of other origins may come through."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._shared = shared(super().__call__, self._access.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._shared(scope, receive, send)
