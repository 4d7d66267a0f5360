"""The way into a replica: what is meant for another server is turned away, and all of it once the server stops."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tpray.errors import MisdirectedError, StoppingError
from tpray.serving.haproxy_start import TOKEN_HEADER

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """Lets requests in, and counts those that are under way. Used on one event loop.

    Args:
        token: what HTTP requests must show, as HAProxy does; None: they need not.
    """

    def __init__(self, token: str | None = None) -> None:
        self._token = None if token is None else token.encode()
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()
        self.under_way = 0
        """How many requests were let in and not answered yet."""

    @contextmanager
    def enter(self) -> Iterator[None]:
        """For the time of one request.

        Raises:
            StoppingError: the gate is closed.
        """
        if self._closed:
            raise StoppingError("this server is stopping and takes no new requests: send it to another one")
        self.under_way += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.under_way -= 1
            if not self.under_way:
                self._empty.set()

    def check(self, scope: Scope) -> None:
        """Raise `MisdirectedError` unless an HTTP request shows the token."""
        if self._token is None:
            return
        shown = next((value for name, value in scope["headers"] if name == TOKEN_HEADER.encode()), b"")
        if not hmac.compare_digest(shown, self._token):
            raise MisdirectedError("this request was meant for another server: send it to the address of this one")

    async def close(self, limit_s: float) -> int:
        """Let nothing in any more, and wait until nothing is under way; how many requests were left at the limit."""
        self._closed = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), limit_s)
        return self.under_way


class GateMiddleware:
    """ASGI middleware: every HTTP request goes through a gate.

    Args:
        answer: makes the answer to a request that the gate does not let in.
    """

    def __init__(self, app: App, gate: Gate, answer: Callable[[Exception], App]) -> None:
        self._app, self._gate, self._answer = app, gate, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as inside:
            try:
                self._gate.check(scope)
                inside.enter_context(self._gate.enter())
            except (MisdirectedError, StoppingError) as e:
                await self._answer(e)(scope, receive, send)
            else:
                await self._app(scope, receive, send)
