"""The life of N ranks that work as one: bring them up, send them steps, notice a failure, end them.

`RankGroup` knows nothing of what the ranks compute; `group.ShardGroup` (a classifier) and `function.FunctionGroup`
(a traced model of the user's own) say how their programs are found, traced, loaded and checked.

`start` brings the ranks up in numbered phases, each timed and each with a limit; `step` sends one frame to every
rank, in the same order to each, and returns rank 0's answer when all have answered. One dead, failed or late rank
fails the whole group: its steps in flight raise, its ranks are killed, and `restart` brings it up again in the same
place from the same artifact.

Everything runs on one asyncio event loop and nothing in it blocks; the ranks' sockets are asyncio transports.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from tpray.errors import GroupError, RankError, StartTimeoutError, StepTimeoutError
from tpray.group import wire
from tpray.group.cores import describe
from tpray.group.ranks import Ranks
from tpray.group.wire import Array, Frame, FrameParser, Kind
from tpray.group.worker import RankInfo
from tpray.parallel_layers.collective import SharedMemoryCollective

log = logging.getLogger("tpray.group")
T = TypeVar("T")

PHASES: dict[str, float] = {
    "resolve": 3600.0,  # a Hub model may have to be downloaded
    "place": 120.0,
    "spawn": 120.0,
    "pin": 10.0,
    "connect": 60.0,
    "trace": 3600.0,
    "load": 600.0,
    "check": 120.0,
    "warm up": 300.0,
}
"""The start-up phases in their order, and how long each may take, seconds."""


@dataclass(frozen=True)
class PhaseReport:
    """One phase of a start: its number from 1, how long it took, and what it found; or, if not ``done``, so far."""

    number: int
    name: str
    seconds: float
    note: str = ""
    done: bool = True


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
class _Pending:
    """A step that was sent and not yet answered by every rank."""

    future: asyncio.Future[StepResult]
    sent: float
    waiting_for: set[int]
    timer: asyncio.TimerHandle
    output: Frame | None = None


class _Link(asyncio.Protocol):
    """The owner's end of one rank's socket."""

    def __init__(self, group: RankGroup, rank: int) -> None:
        self._group, self._rank, self._parser = group, rank, FrameParser()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._parser.feed(data):
                self._group._answered(self._rank, frame)
        except GroupError as e:
            self._group._fail(e)

    def connection_lost(self, exc: Exception | None) -> None:
        self._group._lost(self, self._rank)


class RankGroup(ABC):
    """N ranks, owned by the event loop that starts them.

    Args:
        ranks: how the ranks come to be.
        step_timeout_s: the longest a step may take; a later one fails the group.
        progress: called after every phase, and within those of which a rank tells.
    """

    def __init__(
        self,
        ranks: Ranks,
        step_timeout_s: float = 60.0,
        progress: Callable[[PhaseReport], None] | None = None,
    ) -> None:
        self.ranks = ranks
        self.phases: list[PhaseReport] = []
        self.infos: list[RankInfo] = []
        self.error: GroupError | None = GroupError("the group was not started")
        self.failed = asyncio.Event()
        self.step_timeout_s = step_timeout_s
        self._progress = progress
        self._links: list[_Link] = []
        self._pending: dict[int, _Pending] = {}
        self._next_step = 0
        self._current = ("", 0.0, 0)  # the phase that is going on, since when, and how many notes came of it

    @abstractmethod
    async def _resolve(self) -> None:
        """Find what the ranks will run, before any rank is there."""

    @abstractmethod
    async def _prepare(self) -> None:
        """Have the ranks, which are up and connected, load their programs; traces them where need be."""

    def _note(self, phase: str) -> str:
        """What a phase found, for its report."""
        if phase == "pin":
            pinned = [describe(info.cores) for info in self.infos if info.cores]
            return f"cores {' '.join(pinned)}" if pinned else "not pinned"
        return ""

    async def start(self) -> None:
        """Bring the group up; on any error nothing of it is left running.

        Raises:
            TprayError: of the kind that the failing phase explains.
        """
        try:
            await self._phase("resolve", self._resolve())
            await self._bring_up()
        except BaseException:
            await self.stop()
            raise

    async def restart(self) -> None:
        """Kill what is left of the ranks and bring them up again, in the same place, from the same artifact."""
        log.warning("the group restarts: %s", self.error)
        await self._tear_down()
        self.phases.clear()
        try:
            await self._bring_up()
        except BaseException as e:
            self._fail(GroupError(f"the restart failed: {e}"))
            raise

    async def stop(self) -> None:
        """End the ranks and give the place back; steps in flight raise `GroupError`."""
        self._fail(GroupError("the group was stopped"))
        await self._tear_down()
        self.ranks.release()

    async def _bring_up(self) -> None:
        await self._phase("place", self.ranks.place())
        self.infos = await self._phase("spawn", self.ranks.spawn())
        await self._phase("pin", self._pin())
        await self._phase("connect", self._connect())
        await self._prepare()

    async def _phase(self, name: str, work: Awaitable[T]) -> T:
        number, limit_s = list(PHASES).index(name) + 1, PHASES[name]
        started = time.perf_counter()
        self._current = (name, started, 0)
        try:
            result = await asyncio.wait_for(work, limit_s)
        except asyncio.TimeoutError as e:
            raise StartTimeoutError(f"start-up phase {number} ({name}) did not finish within {limit_s:.0f} s") from e
        report = PhaseReport(number, name, time.perf_counter() - started, self._note(name))
        self.phases.append(report)
        log.info("phase %d %s: %.2f s %s", report.number, report.name, report.seconds, report.note)
        if self._progress is not None:
            self._progress(report)
        return result

    async def _pin(self) -> None:
        if not self.ranks.pins:
            return
        held = await self.ranks.call("pin")
        if not all(held):
            # Some ranks alone on a core and others sharing one would make every step as slow as the worst.
            await self.ranks.call("unpin")
            log.warning("there are not enough free cores for %d ranks: they run unpinned", self.ranks.tp)
        self.infos = await self.ranks.call("info")

    async def _connect(self) -> None:
        listener = wire.Listener()
        limit_s = PHASES["connect"]
        memory, store = os.memfd_create("tpray-memory"), os.memfd_create("tpray-store")
        try:
            os.ftruncate(memory, SharedMemoryCollective.shared_bytes(self.ranks.tp))
            accepting = asyncio.to_thread(listener.accept, self.ranks.tp, [memory, store], limit_s)
            joining = self.ranks.call("connect", listener.address, listener.token, limit_s)
            sockets = (await asyncio.gather(accepting, joining))[0]
        finally:
            listener.close()
            os.close(memory)
            os.close(store)
        self.error = None
        self.failed.clear()
        self._links = [await self._link(rank, sock) for rank, sock in enumerate(sockets)]

    async def _link(self, rank: int, sock: socket.socket) -> _Link:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.connect_accepted_socket(lambda: _Link(self, rank), sock)
        return link

    async def step(self, inputs: Sequence[Array], timeout_s: float | None = None) -> StepResult:
        """Run the program once on every rank.

        Args:
            inputs: the program's, in its order; a classifier's are ``input_ids``, ``attention_mask`` and
                ``token_type_ids``, int64 ``[B, S]`` each.
            timeout_s: shorter than the group's own limit, for a step that must not wait so long.

        Raises:
            GroupError: the group failed, before or during this step; it must be restarted.
        """
        if self.error is not None:
            raise self.error
        loop = asyncio.get_running_loop()
        self._next_step += 1
        number = self._next_step
        timer = loop.call_later(timeout_s or self.step_timeout_s, self._late, number)
        pending = _Pending(loop.create_future(), time.perf_counter(), set(range(self.ranks.tp)), timer)
        self._pending[number] = pending
        data = Frame(Kind.STEP, number, tuple(inputs)).encode()
        for link in self._links:
            assert link.transport is not None
            link.transport.write(data)
        # Shielded: a caller that leaves must not take away the future that the answer will come to.
        return await asyncio.shield(pending.future)

    def _heard(self, rank: int, text: str) -> None:
        """A rank has done a part of the phase that is going on."""
        name, started, count = self._current
        self._current = (name, started, count + 1)
        note = f"{count + 1}{self._parts()} done; rank {rank}: {text}"
        log.info("phase %s: %s", name, note)
        if self._progress is not None and name in PHASES:
            number, seconds = list(PHASES).index(name) + 1, time.perf_counter() - started
            self._progress(PhaseReport(number, name, seconds, note, done=False))

    def _parts(self) -> str:
        """Of how many parts the ranks will tell, as " of N"; nothing if that is not known."""
        return ""

    def _answered(self, rank: int, frame: Frame) -> None:
        if frame.kind is Kind.NOTE:
            self._heard(rank, frame.text)
            return
        pending = self._pending.get(frame.step)
        if pending is None:
            return
        if frame.kind is not Kind.RESULT:
            self._fail(RankError(f"rank {rank} failed in a step: {frame.text}"))
            return
        pending.waiting_for.discard(rank)
        if frame.tensors:
            pending.output = frame
        if pending.waiting_for:
            return
        del self._pending[frame.step]
        pending.timer.cancel()
        output = pending.output
        if output is None:
            self._fail(RankError(f"rank 0 answered step {frame.step} without an output"))
        elif not pending.future.done():
            total_s = time.perf_counter() - pending.sent
            pending.future.set_result(StepResult(output.tensors, output.micros / 1e6, total_s))

    def _late(self, number: int) -> None:
        pending = self._pending.get(number)
        if pending is not None:
            waited = time.perf_counter() - pending.sent
            ranks = ", ".join(map(str, sorted(pending.waiting_for)))
            self._fail(StepTimeoutError(f"a step was not answered by rank {ranks} within {waited:.1f} s"))

    def _lost(self, link: _Link, rank: int) -> None:
        if link in self._links:
            self._fail(RankError(f"rank {rank} died"))

    def _fail(self, error: GroupError) -> None:
        """From here on every step raises, until the group is restarted."""
        if self.error is None:
            self.error = error
            self.failed.set()
        pending, self._pending = self._pending, {}
        for step in pending.values():
            step.timer.cancel()
            if not step.future.done():
                step.future.set_exception(error)
                step.future.exception()  # marks it seen: its caller may have left

    async def _tear_down(self) -> None:
        links, self._links = self._links, []
        # Killed first: a rank that exits by itself when its wire closes looks like a crash to Ray.
        await self.ranks.kill()
        for link in links:
            if link.transport is not None:
                link.transport.abort()
