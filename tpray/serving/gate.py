"""The way into a replica: what is meant for another server is turned away, and all of it once the server stops."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from tpray.errors import MisdirectedError, StoppingError
from tpray.serving.haproxy_start import TOKEN_HEADER

_TOKEN_HEADER = TOKEN_HEADER.encode()


class Gate:
    """Lets requests in, and counts those that are under way. Used on one event loop.

    Args:
        token: what HTTP requests must show, as HAProxy does; None: they need not.
    """

    def __init__(self, token: str | None = None) -> None:
        self._token = None if token is None else token.encode()
        self._closed = asyncio.Event()
        self._empty = asyncio.Event()
        self.under_way = 0
        """How many requests were let in and not answered yet."""

    def enter(self) -> Gate:
        """For the time of one request: ``with gate.enter():``.

        Raises:
            StoppingError: the gate is closed.
        """
        if self._closed.is_set():
            raise StoppingError("this server is stopping and takes no new requests: send it to another one")
        return self

    def __enter__(self) -> None:
        self.under_way += 1

    def __exit__(self, *_: object) -> None:
        self.under_way -= 1
        if self._closed.is_set() and not self.under_way:
            self._empty.set()

    def check(self, scope: MutableMapping[str, Any]) -> None:
        """Raise `MisdirectedError` unless an HTTP request shows the token."""
        if self._token is None:
            return
        shown = next((value for name, value in scope["headers"] if name == _TOKEN_HEADER), b"")
        if not hmac.compare_digest(shown, self._token):
            raise MisdirectedError("this request was meant for another server: send it to the address of this one")

    async def until_closed(self) -> None:
        """Wait until nothing is let in any more."""
        await self._closed.wait()

    async def close(self, limit_s: float) -> int:
        """Let nothing in any more, and wait until nothing is under way; how many requests were left at the limit."""
        self._closed.set()
        if self.under_way:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), limit_s)
        return self.under_way
