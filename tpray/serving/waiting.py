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
from typing import Any, Protocol

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

PATIENCE_S = 0.05
"""A request that takes no longer is not worth a look at whether its client is still there."""


class ClientLeftError(Exception):
    """Nobody is there to read an answer."""


class _Keeper(Protocol):
    """Knows the blocks that are under way."""

    def add(self, block: Block) -> None: ...

    def discard(self, block: Block) -> None: ...


class Block:
    """The code between ``__enter__`` and ``__exit__``, of one task.

    error: what it raises when it is ended. at: when to look at it, `time.monotonic` seconds.
    """

    __slots__ = ("_ended", "_keeper", "_task", "at", "error", "receive", "watcher")

    def __init__(self, keeper: _Keeper, at: float, error: Exception, receive: Receive | None = None) -> None:
        self._keeper, self.at, self.error, self.receive = keeper, at, error, receive
        self.watcher: asyncio.Task[None] | None = None
        self._ended = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._keeper.add(self)

    def end(self) -> None:
        """Have the block raise its error."""
        assert self._task is not None, "a coroutine runs in a task"
        self._ended = True
        self._keeper.discard(self)
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._keeper.discard(self)
        if self.watcher is not None:
            self.watcher.cancel()
        if not self._ended:
            return
        uncancel = getattr(self._task, "uncancel", None)  # Python 3.10 does not count who cancels
        others = uncancel() if uncancel is not None else 0
        if kind is asyncio.CancelledError and not others:
            raise self.error from error


class Deadlines:
    """Ends blocks at their deadlines, with one timer for all, which is set for the earliest deadline that is known."""

    def __init__(self) -> None:
        self._blocks: set[Block] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf

    def until(self, deadline: float, error: Exception) -> Block:
        """A block that raises ``error`` at ``deadline``, `time.monotonic` seconds."""
        return Block(self, deadline, error)

    def add(self, block: Block) -> None:
        """The block was entered."""
        self._blocks.add(block)
        if block.at < self._looks_at:
            self._look_at(block.at)

    def discard(self, block: Block) -> None:
        """The block was left, or is over. The timer stays: to move it costs more than to find nothing to do."""
        self._blocks.discard(block)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = when
        self._timer = asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), self._look)

    def _look(self) -> None:
        self._timer, self._looks_at, now = None, math.inf, time.monotonic()
        for block in [block for block in self._blocks if block.at <= now]:
            block.end()
        if self._blocks:
            self._look_at(min(block.at for block in self._blocks))


class Departures:
    """Ends blocks whose clients leave. Only those that have waited for `PATIENCE_S` get a task that listens."""

    def __init__(self) -> None:
        self._new: dict[Block, None] = {}  # in their order
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, receive: Receive) -> Block:
        """A block that raises `ClientLeftError` when the client has left; ``receive`` has given the whole body."""
        return Block(self, time.monotonic() + PATIENCE_S, ClientLeftError(), receive)

    def add(self, block: Block) -> None:
        """The block was entered."""
        self._new[block] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._look)

    def discard(self, block: Block) -> None:
        """The block was left, or is over."""
        self._new.pop(block, None)

    def _look(self) -> None:
        self._timer, now = None, time.monotonic()
        while (block := next(iter(self._new), None)) is not None and block.at <= now:
            del self._new[block]
            block.watcher = asyncio.get_running_loop().create_task(_listen(block))
        if block is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.001, block.at - now), self._look)


async def _listen(block: Block) -> None:
    assert block.receive is not None, "Departures.watch() gives it"
    if (await block.receive())["type"] == "http.disconnect":
        block.watcher = None
        block.end()
