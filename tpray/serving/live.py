"""``GET /info/stream``: what a group does, once a second, as server-sent events.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html. The event ``info`` is that of `/info`, and
comes again when the group has restarted; ``load`` is `load_of`. A stream ends when its client leaves, when the
server stops, and after `STREAM_S`: its client then asks again, and where there are several groups may hear of another
one. (A replica that Serve replaces waits for its answers to end; that is why none goes on for ever.)
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.types import Receive, Scope, Send

from tpray.errors import OverloadedError
from tpray.serving.dialects.base import Dialect, send_answer
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.load import KEPT_S

PATH = "/info/stream"
PERIOD_S = 1.0
STREAM_S = 20.0
RECENT_S = 10
"""How many seconds ``/info`` tells of, for those that ask again and again."""
LISTENERS = 16
"""How many streams there are at once; who comes on top is told to come back."""

_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect it
]


class Live:
    """The streams of one replica: an ASGI application.

    Args:
        info: what ``GET /info`` says.
        dialect: words the error of a stream too many.
    """

    def __init__(self, engine: Engine, gate: Gate, info: Callable[[], dict[str, Any]], dialect: Dialect) -> None:
        self._engine, self._gate, self._info, self._dialect = engine, gate, info, dialect
        self.listeners = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.listeners >= LISTENERS:
            error = OverloadedError(
                f"{LISTENERS} clients follow this group, and that is the limit: close a page, or try again later",
                round(STREAM_S),
            )
            await send_answer(self._dialect.answer_error(error), send)
            return
        self.listeners += 1
        ends = {asyncio.ensure_future(_until_gone(receive)), asyncio.ensure_future(self._gate.until_closed())}
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._tell(send, ends)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.listeners -= 1
            for end in ends:
                end.cancel()

    async def _tell(self, send: Send, ends: Collection[asyncio.Future[None]]) -> None:
        """Send events until one of ``ends`` is done, or it was long enough."""
        stop_at, told, restarts = time.monotonic() + STREAM_S, 0, None
        while not any(end.done() for end in ends) and time.monotonic() < stop_at:
            body = b""
            if restarts != self._engine.restarts:
                restarts = self._engine.restarts
                body = _event("info", self._info())
            now = self._engine.load.now
            body += _event("load", load_of(self._engine, self._gate, told, now))
            told = now
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.wait(ends, timeout=PERIOD_S, return_when=asyncio.FIRST_COMPLETED)


def load_of(engine: Engine, gate: Gate, first: int, now: int) -> dict[str, Any]:
    """What a group does now, and what it did in the seconds from ``first`` on that are over: ``load`` in ``/info``.

    ``waits_s`` has of each rank how long it has waited for others in collectives since it came up. ``seconds`` has of
    each in which a step ended its number, the steps, their texts and tokens, and how long rank 0's program took in
    them, waiting for the other ranks included.
    """
    life = engine.group.lifecycle
    return {
        "state": life.state.value,
        "error": None if life.error is None else str(life.error),
        "restarts": life.restarts,
        "up_s": round(time.monotonic() - engine.startup[-1].ended, 1),
        "under_way": gate.under_way,
        "queued_tokens": engine.queued_tokens,
        "waits_s": engine.group.channel.waits_s,
        "now": now,
        "kept_s": KEPT_S,
        "seconds": engine.load.between(first, now),
    }


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
