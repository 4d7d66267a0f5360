"""The owner's end of the wires to all ranks: steps go out, answers come back, and a rank that is gone is noticed."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from tpray.errors import GroupError, RankError, StepError, StepTimeoutError
from tpray.group.pace import Limits
from tpray.group.rank_time import RankTime, RankTotal
from tpray.group.wire import Array, Frame, FrameParser, Kind
from tpray.parallel_layers.counters import furthest_behind, read_counters, read_waits_s


@dataclass(frozen=True)
class StepResult:
    """outputs: rank 0's, owned by the receiver. How long rank 0 computed; how long the step took once begun.

    ranks: the time of each, in their order; empty: that is not known.
    """

    outputs: tuple[Array, ...]
    compute_s: float
    total_s: float
    ranks: tuple[RankTime, ...] = ()

    @classmethod
    def of_parts(cls, outputs: tuple[Array, ...], parts: Sequence[StepResult]) -> StepResult:
        """A step that went in parts, one after another: their times together."""
        ranks = tuple(map(RankTime.together, zip(*(part.ranks for part in parts), strict=True)))
        return cls(outputs, sum(part.compute_s for part in parts), sum(part.total_s for part in parts), ranks)

    @property
    def logits(self) -> Array:
        """The one output of a classifier, float32 ``[B, L]``."""
        return self.outputs[0]


@dataclass
class _Step:
    """A step that was sent and not yet answered by every rank.

    began, due: when the ranks could begin it, and when it has failed; `time.perf_counter` seconds.
    """

    future: asyncio.Future[StepResult]
    limits: Limits
    waiting_for: set[int]
    began: float = 0.0
    due: float = 0.0
    output: Frame | None = None
    raised: dict[int, Frame] = field(default_factory=dict)
    times: dict[int, RankTime] = field(default_factory=dict)


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

    The ranks answer steps in their order, so that only the oldest one has a limit that runs. What all ranks raise alike
    in a step is that step's own error. Anything else is a failure of the group: a rank that raises and the others do
    not, or not at the same point; one that is late; one that is gone.

    Args:
        on_failure: called when the group has failed. It is to `fail` the channel.
        on_report: called with a rank and what it says it has done, during a start.
    """

    def __init__(self, on_failure: Callable[[GroupError], object], on_report: Callable[[int, str], object]) -> None:
        self.on_failure, self._on_report = on_failure, on_report
        self._links: list[_Link] = []
        self._steps: dict[int, _Step] = {}
        self._last = 0
        self._timer: asyncio.TimerHandle | None = None  # rings when the oldest step is due, or before
        self._rings_at = 0.0
        self._memory: int | None = None
        self.times: list[RankTotal] = []
        """Where the time of each rank went, in all steps that it has ended since the first start."""

    async def open(self, sockets: Sequence[socket.socket], memory: int | None = None) -> None:
        """Take the sockets of the ranks, in their order, and a descriptor of the memory that these share."""
        self._memory = memory
        self.times.extend(RankTotal() for _ in sockets[len(self.times) :])
        for rank, sock in enumerate(sockets):
            sock.setblocking(False)
            link = _Link(self, rank)
            self._links.append(link)
            await link.open(sock)

    def send(self, inputs: Sequence[Array], limits: Limits, kind: Kind = Kind.STEP) -> asyncio.Future[StepResult]:
        """Send one step, or a part of one, to every rank; the future has rank 0's outputs once all have answered.

        Its limits count from when the steps before it were answered. The future raises `StepError` when all ranks
        raised the same.

        Raises:
            ConfigError: the wire does not carry an input's dtype.
        """
        loop = asyncio.get_running_loop()
        data = Frame(kind, self._last + 1, tuple(inputs)).encode()  # first: it may refuse the inputs
        self._last += 1
        step = _Step(loop.create_future(), limits, set(range(len(self._links))))
        self._steps[self._last] = step
        if len(self._steps) == 1:
            self._begin_oldest()
        for link in self._links:
            assert link.transport is not None, "open() waits for it"
            link.transport.write(data)
        return step.future

    def fail(self, error: GroupError) -> None:
        """Have every step that is under way raise ``error``."""
        steps, self._steps = self._steps, {}
        for step in steps.values():
            _set_error(step, error)

    def close(self) -> None:
        """Close the sockets. Call `fail` before, so that nobody waits for a step."""
        self._stop_timer()
        links, self._links = self._links, []
        for link in links:
            if link.transport is not None:
                link.transport.abort()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def on_frame(self, rank: int, frame: Frame) -> None:
        """A rank has said something."""
        if frame.kind is Kind.PROGRESS:
            self._on_report(rank, frame.text)
            return
        step = self._steps.get(frame.step)
        if step is None:
            return
        step.waiting_for.discard(rank)
        if frame.kind is not Kind.RESULT:
            step.raised[rank] = frame
        else:
            took = step.times[rank] = RankTime(frame.micros / 1e6, None if frame.waited < 0 else frame.waited / 1e6)
            self.times[rank].add(took)
            step.output = frame if frame.tensors else step.output
        answered = len(self._links) - len(step.waiting_for)
        if step.raised and (not step.waiting_for or answered > len(step.raised)):
            self._on_raised(frame.step, step)
        elif step.raised and step is self._oldest:
            self._set_timer(step)
        elif not step.waiting_for:
            self._on_answered(frame.step, step)

    def on_lost(self, link: _Link, rank: int) -> None:
        """A socket was closed by its other end."""
        if link in self._links:
            self.on_failure(RankError(f"rank {rank} died"))

    @property
    def waits_s(self) -> list[float]:
        """How long each rank has waited for others in collectives since it came up; []: that is not known."""
        return read_waits_s(self._memory, len(self._links)) if self._memory is not None else []

    @property
    def _oldest(self) -> _Step | None:
        return next(iter(self._steps.values()), None)

    def _begin_oldest(self) -> None:
        """The ranks may begin the step that is the oldest now: its limit counts from here."""
        step = self._oldest
        if step is not None:
            step.began = time.perf_counter()
            self._set_timer(step)

    def _set_timer(self, step: _Step) -> None:
        """Have the oldest step fail at its limit; and once a rank has raised in it, after its grace.

        A timer that rings before stays: it finds nothing to do, and is set anew.
        """
        now = time.perf_counter()
        step.due = step.began + step.limits.answer_s
        if step.raised:
            step.due = min(step.due, now + step.limits.grace_s)
        if self._timer is None or step.due < self._rings_at:
            self._stop_timer()
            self._ring(step.due, now)

    def _ring(self, due: float, now: float) -> None:
        self._rings_at = due
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer, step = None, self._oldest
        if step is None:
            return
        now = time.perf_counter()
        if step.due > now:
            self._ring(step.due, now)
        else:
            self._on_late()

    def _on_answered(self, number: int, step: _Step) -> None:
        """Every rank has answered."""
        output = step.output
        if output is None:
            self.on_failure(RankError(f"rank 0 answered step {number} without an output"))
            return
        del self._steps[number]
        self._begin_oldest()
        if not step.future.done():
            total_s = time.perf_counter() - step.began
            ranks = tuple(step.times[rank] for rank in sorted(step.times))
            step.future.set_result(StepResult(output.tensors, output.micros / 1e6, total_s, ranks))

    def _on_raised(self, number: int, step: _Step) -> None:
        """Some rank has raised, and either all have, or another one has not, or none will any more."""
        if not step.waiting_for and len(step.raised) == len(self._links) and _alike(step.raised.values()):
            del self._steps[number]
            self._begin_oldest()
            text = step.raised[0].text.partition("\n")[0]
            _set_error(step, StepError(f"the model raised the same on every rank: {text}"))
            return
        # A collective that fails on one rank tells of another: whoever raised something else is the one to name.
        rank = min(step.raised, key=lambda rank: (step.raised[rank].kind is Kind.FAULT, rank))
        others = [f"rank {other}: {frame.text}" for other, frame in sorted(step.raised.items()) if other != rank]
        silent = [other for other in range(len(self._links)) if other not in step.raised]
        did = [*others, *([f"rank {_listed(silent)} did not"] if silent else [])]
        self.on_failure(RankError(f"rank {rank} failed in a step: {'; '.join([step.raised[rank].text, *did])}"))

    def _on_late(self) -> None:
        number, step = next(iter(self._steps.items()))
        if any(frame.kind is not Kind.FAULT for frame in step.raised.values()):
            self._on_raised(number, step)
            return
        waited_s = time.perf_counter() - step.began
        counters = read_counters(self._memory, len(self._links)) if self._memory is not None else []
        behind = furthest_behind(counters, step.waiting_for) or sorted(step.waiting_for)
        text = f"a step was not answered by rank {_listed(behind)} within {waited_s:.1f} s"
        if waiting := [rank for rank in sorted(step.waiting_for) if rank not in behind]:
            text += f"; rank {_listed(waiting)} waits for it in a collective"
        self.on_failure(StepTimeoutError(text))


_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


def _alike(raised: Iterable[Frame]) -> bool:
    """Whether ranks raised the same at the same point: an error's type and words, and as many exchanges before it.

    Numbers in the words may differ: shares of a tensor need not be of one size, nor objects at one address.
    """
    frames = list(raised)
    said = {(_NUMBER.sub("#", frame.text), *(int(count) for count in frame.tensors)) for frame in frames}
    return len(said) == 1 and all(frame.kind is Kind.ERROR for frame in frames)


def _set_error(step: _Step, error: Exception) -> None:
    if not step.future.done():
        step.future.set_exception(error)
        step.future.exception()  # marks it seen: its caller may have left


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
