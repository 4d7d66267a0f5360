"""The owner's end of the wires to all ranks: steps go out, answers come back, and a rank that is gone is noticed."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from tpray.errors import GroupError, RankError, StepTimeoutError
from tpray.group.wire import Array, Frame, FrameParser, Kind


@dataclass(frozen=True)
class StepResult:
    """outputs: rank 0's, owned by the receiver. How long rank 0 computed; how long the step took."""

    outputs: tuple[Array, ...]
    compute_s: float
    total_s: float

    @property
    def logits(self) -> Array:
        """The one output of a classifier, float32 ``[B, L]``."""
        return self.outputs[0]


@dataclass
class _Step:
    """A step that was sent and not yet answered by every rank."""

    future: asyncio.Future[StepResult]
    sent: float
    waiting_for: set[int]
    timer: asyncio.TimerHandle
    output: Frame | None = None


class _Link(asyncio.Protocol):
    """The owner's end of one rank's socket."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel, self._rank, self._parser = channel, rank, FrameParser()
        self.transport: asyncio.Transport | None = None

    async def open(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._parser.feed(data):
                self._channel.on_frame(self._rank, frame)
        except GroupError as e:
            self._channel.on_failure(e)

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel.on_lost(self, self._rank)


class Channel:
    """Steps to the ranks of one group, and their answers. Used on one event loop; nothing in it blocks.

    Args:
        on_failure: called once a rank is gone, answers with an error, or is late. It is to `fail` the channel.
        on_report: called with a rank and what it says it has done, during a start.
    """

    def __init__(self, on_failure: Callable[[GroupError], object], on_report: Callable[[int, str], object]) -> None:
        self.on_failure, self._on_report = on_failure, on_report
        self._links: list[_Link] = []
        self._steps: dict[int, _Step] = {}
        self._last = 0

    async def open(self, sockets: Sequence[socket.socket]) -> None:
        """Take the sockets of the ranks, in their order."""
        for rank, sock in enumerate(sockets):
            sock.setblocking(False)
            link = _Link(self, rank)
            self._links.append(link)
            await link.open(sock)

    def send(self, inputs: Sequence[Array], timeout_s: float) -> asyncio.Future[StepResult]:
        """Send one step to every rank; the future has rank 0's outputs once all have answered.

        Raises:
            ConfigError: the wire does not carry an input's dtype.
        """
        loop = asyncio.get_running_loop()
        self._last += 1
        number = self._last
        data = Frame(Kind.STEP, number, tuple(inputs)).encode()  # first: it may refuse the inputs
        timer = loop.call_later(timeout_s, self._on_late, number)
        step = _Step(loop.create_future(), time.perf_counter(), set(range(len(self._links))), timer)
        self._steps[number] = step
        for link in self._links:
            assert link.transport is not None, "open() waits for it"
            link.transport.write(data)
        return step.future

    def fail(self, error: GroupError) -> None:
        """Have every step that is under way raise ``error``."""
        steps, self._steps = self._steps, {}
        for step in steps.values():
            step.timer.cancel()
            if not step.future.done():
                step.future.set_exception(error)
                step.future.exception()  # marks it seen: its caller may have left

    def close(self) -> None:
        """Close the sockets. Call `fail` before, so that nobody waits for a step."""
        links, self._links = self._links, []
        for link in links:
            if link.transport is not None:
                link.transport.abort()

    def on_frame(self, rank: int, frame: Frame) -> None:
        """A rank has said something."""
        if frame.kind is Kind.PROGRESS:
            self._on_report(rank, frame.text)
            return
        step = self._steps.get(frame.step)
        if step is None:
            return
        if frame.kind is not Kind.RESULT:
            self.on_failure(RankError(f"rank {rank} failed in a step: {frame.text}"))
            return
        step.waiting_for.discard(rank)
        if frame.tensors:
            step.output = frame
        if step.waiting_for:
            return
        del self._steps[frame.step]
        step.timer.cancel()
        output = step.output
        if output is None:
            self._steps[frame.step] = step  # to fail with the others
            self.on_failure(RankError(f"rank 0 answered step {frame.step} without an output"))
        elif not step.future.done():
            total_s = time.perf_counter() - step.sent
            step.future.set_result(StepResult(output.tensors, output.micros / 1e6, total_s))

    def on_lost(self, link: _Link, rank: int) -> None:
        """A socket was closed by its other end."""
        if link in self._links:
            self.on_failure(RankError(f"rank {rank} died"))

    def _on_late(self, number: int) -> None:
        step = self._steps.get(number)
        if step is not None:
            waited = time.perf_counter() - step.sent
            ranks = ", ".join(map(str, sorted(step.waiting_for)))
            self.on_failure(StepTimeoutError(f"a step was not answered by rank {ranks} within {waited:.1f} s"))
