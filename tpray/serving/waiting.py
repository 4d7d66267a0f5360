"""Requests that wait, and what ends their waiting: a deadline, or a client that leaves. No task or timer for each.

A block of code is entered by the task of its request. What ends it cancels that task, and the block raises an error in
place of the cancellation; a cancellation by somebody else goes through. Used on one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

PATIENCE_S = 0.05
"""A request that takes no longer is not worth a look at whether its client is still there."""


class ClientLeftError(Exception):
    """Nobody is there to read an answer."""


class Block:
    """The code between ``__enter__`` and ``__exit__``, of one task.

    deadline: when it is ended, `time.monotonic` seconds. error: what it raises then, and when it is ended before.
    """

    __slots__ = ("_ended", "_listener", "_receive", "_task", "_waiting", "deadline", "error", "listens_at")

    def __init__(self, waiting: Waiting, deadline: float, error: Exception) -> None:
        self._waiting, self.deadline, self.error = waiting, deadline, error
        self._ended = False
        self._listener: asyncio.Task[None] | None = None
        self.listens_at = math.inf

    def __enter__(self) -> Block:
        self._task = asyncio.current_task()
        self._waiting.add(self)
        return self

    def listen(self, receive: Receive) -> None:
        """From now on raise `ClientLeftError` when the client leaves; ``receive`` has given the whole body."""
        self._receive = receive
        self._waiting.add_listener(self)

    def start_listening(self) -> None:
        """The block has taken long enough to be worth a task."""
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        if (await self._receive())["type"] == "http.disconnect":
            self._listener, self.error = None, ClientLeftError()
            self.end()

    def end(self) -> None:
        """Have the block raise its error."""
        assert self._task is not None, "a coroutine runs in a task"
        self._ended = True
        self._waiting.discard(self)
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._waiting.discard(self)
        if self._listener is not None:
            self._listener.cancel()
        if not self._ended:
            return
        assert self._task is not None, "it was cancelled"
        others = self._task.uncancel()
        if kind is asyncio.CancelledError and not others:
            raise self.error from error


class Waiting:
    """The blocks that are under way, with one timer for their deadlines and one for those that listen."""

    def __init__(self) -> None:
        self._blocks: set[Block] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf
        self._listeners: dict[Block, None] = {}  # that do not listen yet, in their order
        self._listener_timer: asyncio.TimerHandle | None = None

    def until(self, deadline: float, error: Exception) -> Block:
        """A block that raises ``error`` at ``deadline``, `time.monotonic` seconds."""
        return Block(self, deadline, error)

    def add(self, block: Block) -> None:
        """The block was entered."""
        self._blocks.add(block)
        if block.deadline < self._looks_at:
            self._look_at(block.deadline)

    def add_listener(self, block: Block) -> None:
        """The block is to listen, if it is still there in `PATIENCE_S`."""
        block.listens_at = time.monotonic() + PATIENCE_S
        self._listeners[block] = None
        if self._listener_timer is None:
            self._listener_timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._start_listeners)

    def discard(self, block: Block) -> None:
        """The block was left, or is over. The timers stay: to move one costs more than to find nothing to do."""
        self._blocks.discard(block)
        self._listeners.pop(block, None)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = when
        self._timer = asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), self._look)

    def _look(self) -> None:
        self._timer, self._looks_at, now = None, math.inf, time.monotonic()
        for block in [block for block in self._blocks if block.deadline <= now]:
            block.end()
        if self._blocks:
            self._look_at(min(block.deadline for block in self._blocks))

    def _start_listeners(self) -> None:
        self._listener_timer, now = None, time.monotonic()
        while (block := next(iter(self._listeners), None)) is not None and block.listens_at <= now:
            del self._listeners[block]
            block.start_listening()
        if block is not None:
            wait_s = max(0.001, block.listens_at - now)
            self._listener_timer = asyncio.get_running_loop().call_later(wait_s, self._start_listeners)
