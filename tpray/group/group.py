"""The running thing: N ranks that work as one, from their start to their end.

`Group` knows nothing of what the ranks compute; `classifier.ClassifierGroup` and `user_model.UserModelGroup` say how
their programs are found, traced, loaded and checked.

`start` brings the ranks up in numbered phases, each timed and each with a limit. `step` sends one frame to every rank,
in the same order to each, and returns rank 0's answer when all have answered. What all ranks raise alike is an error of
that step, and no more. One dead, failed or late rank fails the whole group: its steps in flight raise, its ranks are
killed, and the supervisor brings it up again in the same place from the same artifact.

Everything runs on one asyncio event loop and nothing in it blocks; the ranks' sockets are asyncio transports.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tpray.errors import GroupError, ParityError, RankError, StartTimeoutError, StepError, TprayError
from tpray.group import wire
from tpray.group.attempts import TRIAL_S, Attempts
from tpray.group.channel import Channel, StepResult
from tpray.group.executor import Executor
from tpray.group.jobs import WorkerInfo
from tpray.group.lifecycle import Lifecycle, State
from tpray.group.pace import Pace
from tpray.group.phases import PHASES, CurrentPhase, PhaseReport
from tpray.group.supervisor import Supervisor
from tpray.group.wire import Array, Kind
from tpray.platforms.cores import describe
from tpray.platforms.topology import Topology

log = logging.getLogger(__name__)
T = TypeVar("T")


class Group(ABC):
    """N ranks, owned by the event loop that starts them.

    Args:
        executor: what starts the ranks and calls them.
        step_timeout_s: the longest a step may ever take. Once steps were measured the limit is far below; see `Pace`.
        progress: called after every phase, and within those of which a rank reports.
    """

    def __init__(
        self,
        executor: Executor,
        step_timeout_s: float = 60.0,
        progress: Callable[[PhaseReport], None] | None = None,
    ) -> None:
        self.executor = executor
        self._topology = executor.topology  # the executor's is that of the ranks it has just now
        self.lifecycle = Lifecycle()
        self.phases: list[PhaseReport] = []
        self.workers: list[WorkerInfo] = []
        self.step_timeout_s = step_timeout_s
        self.layout_failure: str | None = None
        """How the layout that was tried first has failed; None: it runs, or there is but one."""
        self.answered = 0  # steps of others than the group itself
        self._pace = Pace()
        self._progress = progress
        self._supervisor = Supervisor(self)
        self.channel = Channel(self._fail, self._on_report)
        self._current: CurrentPhase | None = None
        self._ended = 0.0  # the last phase, by `time.monotonic`: the next one is counted from there
        self._failure: asyncio.Future[None] | None = None  # of a start that is under way
        self._end: asyncio.Task[None] | None = None  # of `stop`, whoever asks for it
        self._ending = asyncio.Lock()  # of ranks: a start that fails and `stop` may both want that

    @property
    def tp(self) -> int:
        """The tensor-parallel degree."""
        return self._topology.tp

    @abstractmethod
    async def _resolve(self) -> None:
        """Find what the ranks will run, before any rank is there."""

    @property
    def _must_trace(self) -> bool:
        """Whether the ranks have nothing to load yet."""
        return False

    @abstractmethod
    async def _prepare(self) -> None:
        """Have the ranks, which are up and connected, load their programs; traces them where need be."""

    def _note(self, phase: str) -> str:
        """What a phase found, for its report."""
        if phase == "pin":
            pinned = [describe(worker.cores) for worker in self.workers if worker.cores]
            return f"cores {' '.join(pinned)}" if pinned else "not pinned"
        return ""

    @property
    def _expected_reports(self) -> int:
        """How often the ranks will report within the phase that is going on; 0: that is not known."""
        return 0

    async def start(self) -> None:
        """Bring the group up; on any error nothing of it is left running.

        Raises:
            TprayError: of the kind that the failing phase explains.
        """
        self.lifecycle.move(State.STARTING)
        try:
            await self._bring_up(first=True)
        except BaseException as e:
            try:
                await self.stop(GroupError(f"the start failed: {e}"))
            except GroupError as also:
                log.error("%s", also)  # what made the start fail says more
            raise
        self.lifecycle.move(State.READY)
        self._supervisor.start()

    async def restart(self) -> None:
        """Kill what is left of the ranks and bring them up again, in the same place, from the same artifact.

        For the supervisor; see `Supervisor`.
        """
        log.warning("the group restarts: %s", self.lifecycle.error)
        self.lifecycle.move(State.STARTING)
        try:
            self.phases.clear()
            await self._tear_down()
            await self._bring_up(first=False)
        except BaseException as e:
            if self.lifecycle.state is State.STARTING:  # it may have been stopped meanwhile
                self.lifecycle.move(State.FAILED, e if isinstance(e, GroupError) else GroupError(str(e)))
            raise
        self.lifecycle.move(State.READY)

    async def stop(self, reason: GroupError | None = None) -> None:
        """End the ranks and give their place back; steps in flight, and later ones, raise ``reason``. Safe to repeat.

        Raises:
            GroupError: a rank cannot be ended; the place was given back all the same.
        """
        if self._end is None:
            error = reason or GroupError("the group was stopped")
            self.lifecycle.move(State.STOPPED, error)
            self._abort(error)
            supervised = self._supervisor.release()
            self._end = asyncio.get_running_loop().create_task(self._finish(supervised))
        # Shielded: whoever asked may leave, and the ranks end all the same; whoever asks again waits for the same end.
        await asyncio.shield(self._end)

    async def _finish(self, supervised: asyncio.Task[None] | None) -> None:
        """End what is left, each part whatever became of the one before."""
        try:
            if supervised is not None:
                supervised.cancel()
                await asyncio.wait({supervised}, timeout=PHASES["pin"])
        finally:
            try:
                await self._tear_down()
            finally:
                self.executor.release()

    async def step(self, inputs: Sequence[Array], timeout_s: float | None = None, kind: Kind = Kind.STEP) -> StepResult:
        """Run the program once on every rank.

        Args:
            inputs: the program's, in its order; a classifier's are ``input_ids``, ``attention_mask`` and
                ``token_type_ids``, int64 ``[B, S]`` each.
            timeout_s: shorter than the group's own limit, for a step that must not wait so long.
            kind: a whole step, or which part of one.

        Raises:
            NotReadyError: the group takes no steps now, and nothing was sent.
            StepError: every rank raised the same; the group goes on.
            GroupError: the group failed during this step; the supervisor restarts it.
        """
        self.lifecycle.check_ready()
        if self._topology.tracing:
            raise GroupError("this model was traced, and has no ranks here: load its artifact where its cores are")
        try:
            result = await self._run(inputs, timeout_s, kind)
        except StepError:
            await self._check_sound()
            self.answered += 1
            raise
        self.answered += 1
        return result

    async def _run(self, inputs: Sequence[Array], timeout_s: float | None = None, kind: Kind = Kind.STEP) -> StepResult:
        """`step` in any state in which the ranks are connected: the check and the warm-up of a start use it."""
        size = self._size(inputs) if kind is Kind.STEP else None
        # During a start steps compile, and touch memory for the first time.
        known = size is not None and self.lifecycle.state is State.READY
        ceiling_s = min(self.step_timeout_s, timeout_s or self.step_timeout_s)
        limits = self._pace.limits(size if known else None, ceiling_s)
        # Shielded: a caller that leaves must not take away the future that the answer will come to.
        result = await asyncio.shield(self.channel.send(inputs, limits, kind))
        if size is not None:
            self._pace.measure(size, result.total_s)
        return result

    def _size(self, inputs: Sequence[Array]) -> int | None:
        """What the time of a step goes with, as a number; None: with nothing known, and only the ceiling holds."""
        return int(inputs[0].size)

    async def _prove(self) -> None:
        """Run a step whose answer is known, where one is; `StepError` or `ParityError` if another comes."""
        return None

    async def _check_sound(self) -> None:
        """After a step in which all ranks raised the same: fail the group if they do so whatever they are given.

        Raises:
            GroupError: they do.
        """
        if self.lifecycle.state is not State.READY:
            return
        try:
            await self._prove()
        except (StepError, ParityError) as e:
            error = RankError(f"every rank fails, whatever it is given: {e}")
            self._fail(error)
            raise error from e

    async def _bring_up(self, first: bool) -> None:
        attempts, self._ended = Attempts(self._topology), time.monotonic()
        self._failure = asyncio.get_running_loop().create_future()
        try:
            if first:
                await self._phase("resolve", self._resolve())
            while not await self._attempt(attempts):
                pass
            # What has worked is kept: a restart that fails is no reason to doubt the layout.
            self._topology = self.executor.topology = replace(attempts.topology, fallback=None)
        finally:
            self._failure.cancel()
            self._failure = self._current = None

    async def _attempt(self, attempts: Attempts) -> bool:
        """Bring the ranks up once; whether that succeeded. False: what is left is ended, and another try is to come."""
        assert self._failure is not None, "attempts belong to a start"
        try:
            self.executor.topology = self._topology
            await self._phase("place", self.executor.place())
            await self._join(self._topology.for_tracing() if self._must_trace else self._topology)
            await self._prepare()
            if self._topology.tracing:  # nothing is left for the ranks to do
                await self._end_ranks()
                self.workers = []
            return True
        except Exception as e:
            if self.lifecycle.state is not State.STARTING:  # it was stopped
                raise
            current = self._current
            assert current is not None, "a phase sets it"
            seconds = time.perf_counter() - current.started
            attempt = attempts.after(e, current.name, seconds)
            if attempt is None:
                explained = attempts.explain(e)
                if explained is e:
                    raise
                raise explained from e
        log.warning("%s", attempt.reason)
        self._reported(list(PHASES).index(current.name) + 1, current.name, attempt.reason)
        self.layout_failure = attempts.layout_failure or self.layout_failure
        await self._end_ranks(attempt.pause_s)
        self._topology = attempt.topology
        return False

    async def _join(self, topology: Topology) -> None:
        """Bring up ranks that lie so, and have them connect."""
        self.executor.topology = topology
        self.workers = await self._phase("spawn", self.executor.spawn())
        await self._phase("pin", self._pin())
        await self._phase("connect", self._connect())

    async def _trace_phase(self, trace: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Have ranks trace. Where those that trace are others than those that load, they come up for it and go."""
        tracing = self._topology.for_tracing()
        if self.executor.topology != tracing:
            await self._replace_ranks(tracing)
        result = await self._phase("trace", trace())
        if tracing != self._topology:
            await self._replace_ranks(self._topology)
        return result

    async def _replace_ranks(self, topology: Topology) -> None:
        await self._end_ranks()
        await self._join(topology)

    async def _end_ranks(self, pause_s: float = 0.0) -> None:
        """End the ranks of a start that goes on with others, after a pause."""
        assert self._failure is not None, "ranks change within a start"
        self._failure.cancel()  # that these ranks are gone is no failure
        await self._tear_down()
        await asyncio.sleep(pause_s)
        if self.lifecycle.state is not State.STARTING:  # it was stopped meanwhile
            raise self.lifecycle.why_not_ready()
        self._failure = asyncio.get_running_loop().create_future()

    async def _phase(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """Run one phase of a start: within its limit, and until a rank fails."""
        assert self._failure is not None, "phases belong to a start"
        self._current = CurrentPhase(name, time.perf_counter())
        if self._failure.done():  # between two phases
            work.close()
            self._failure.result()
        number, limit_s = list(PHASES).index(name) + 1, PHASES[name]
        if self.executor.topology.fallback is not None:
            limit_s = min(limit_s, TRIAL_S.get(name, limit_s))
        task = asyncio.ensure_future(work)
        waiting: set[asyncio.Future[Any]] = {task, self._failure}
        try:
            await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                if self._failure.done():
                    self._failure.result()
                raise StartTimeoutError(f"start-up phase {number} ({name}) did not finish within {limit_s:.0f} s")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        result = task.result()
        if self._failure.done():
            self._failure.result()
        self._reported(number, name, self._note(name))
        return result

    def _reported(self, number: int, name: str, note: str, ended: float | None = None) -> None:
        """Keep the report of a phase that has ended, and pass it on. What lies between two phases is the second's."""
        before, self._ended = self._ended, ended or time.monotonic()
        report = PhaseReport(number, name, self._ended - before, note, ended=self._ended)
        self.phases.append(report)
        log.info("phase %d %s: %.2f s %s", report.number, report.name, report.seconds, report.note)
        if self._progress is not None:
            self._progress(report)

    async def _pin(self) -> None:
        self.workers = await self.executor.pin()

    async def _connect(self) -> None:
        listener = wire.Listener()
        limit_s = PHASES["connect"]
        memory, store = os.memfd_create("tpray-memory"), os.memfd_create("tpray-store")
        accepting = asyncio.ensure_future(asyncio.to_thread(listener.accept, self.tp, [memory, store], limit_s))
        # It raises what `gather` has raised already, or is let go of.
        accepting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            wait_s = self.step_timeout_s + limit_s
            joining = self.executor.connect(listener.address, listener.token, limit_s, wait_s)
            sockets = (await asyncio.gather(asyncio.shield(accepting), joining))[0]
            await self.channel.open(sockets, os.dup(memory))
        finally:
            listener.close()
            # The next attempt may be given the same numbers for its descriptors: the thread must use them no longer.
            await asyncio.wait({accepting}, timeout=1.0)
            os.close(memory)
            os.close(store)

    def _on_report(self, rank: int, text: str) -> None:
        """A rank has done a part of the phase that is going on."""
        current = self._current
        if current is None:
            return
        current.reports += 1
        of = f" of {self._expected_reports} programs" if self._expected_reports else ""
        note = f"{current.reports}{of} done; rank {rank}: {text}"
        log.info("phase %s: %s", current.name, note)
        if self._progress is not None:
            number, seconds = list(PHASES).index(current.name) + 1, time.perf_counter() - current.started
            self._progress(PhaseReport(number, current.name, seconds, note, done=False))

    def _fail(self, error: GroupError) -> None:
        """A rank died, failed or was late: a running group fails, a start is given up."""
        if self.lifecycle.state is State.READY:
            self.lifecycle.move(State.FAILED, error)
        self._abort(error)

    def _abort(self, error: TprayError) -> None:
        """Have what is under way raise ``error``: steps, and a start."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # marks it seen: the phase may end by itself
        self.channel.fail(error if isinstance(error, GroupError) else GroupError(str(error)))

    async def _tear_down(self) -> None:
        async with self._ending:
            try:
                # Killed first: a rank that exits by itself when its wire closes looks like a crash to Ray.
                await self.executor.kill()
            finally:
                self.channel.close()
