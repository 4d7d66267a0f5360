"""The real executor: ranks in Ray actors, all in one placement group."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tpray import logs
from tpray.config import cache_dir
from tpray.errors import GroupError, PlacementError, RankError, TprayError
from tpray.group import spares
from tpray.group.executor import Worker, WorkerExecutor
from tpray.group.jobs import WorkerInfo
from tpray.group.placement import Placement
from tpray.group.worker_host import WorkerHost
from tpray.platforms import lease
from tpray.platforms.base import ProcessCores
from tpray.platforms.cores import describe, is_aligned, is_run
from tpray.platforms.lease import Lease
from tpray.platforms.topology import Topology

log = logging.getLogger(__name__)
T = TypeVar("T")

PLACE_ATTEMPTS = 8
PLACE_WAIT_S = 5.0
OBEY_S = 1.0
"""How long a rank may take to end when Ray asks it to, which one that is stopped does not hear."""
KILL_S = 10.0
"""How long one may take to end when the kernel kills it; see also `Platform.busy_limit_s`."""


class RayExecutor(WorkerExecutor):
    """See `tpray.group.executor.Executor`."""

    def __init__(self, topology: Topology, spares: Sequence[str] = ()) -> None:
        """spares: names of processes that may wait for ranks; see `tpray.group.spares`."""
        super().__init__(topology)
        self._spares = spares
        self._placement: Placement | None = None
        self._ports: Lease | None = None
        self._actors: list[Any] = []
        self._processes: dict[int, int] = {}  # process id -> pidfd

    async def place(self) -> None:
        if self._placement is None:
            self._placement = await Placement.acquire(self.topology)
            await self._placement.ready()

    async def spawn(self) -> list[WorkerInfo]:
        topology, how = self.topology, logs.current()
        if not topology.on_assigned_cores:
            names, self._spares = self._spares, ()  # of the first start
            self._actors = await spares.claim(names, len(topology.processes))
            self._start_actors()
            variables = topology.platform.tracing_environment(self._cache)
            begin: list[tuple[Any, ...]] = [(ranks, topology, variables, None, how) for ranks in topology.processes]
        else:
            cores = await self._spawn_on_cores()
            self._ports = lease.take_ports(2, lease.GROUP_PORTS)
            first, second = self._ports.ids
            width = topology.cores_per_rank
            given = [
                ProcessCores(ranks, cores[ranks.start * width : ranks.stop * width], (first, second), self._cache)
                for ranks in topology.processes
            ]
            topology.platform.prepare_machine(given[0])
            begin = [self._begin_on(process, how) for process in given]
        calls = [actor.begin.remote(*arguments) for actor, arguments in zip(self._actors, begin, strict=True)]
        infos = [info for infos in await _gather(calls, "begin") for info in infos]
        self._remember(info.pid for info in infos)
        return infos

    def _begin_on(self, process: ProcessCores, how: logs.LogSettings) -> tuple[Any, ...]:
        """The arguments of `WorkerHost.begin` for a process that Ray gave cores."""
        topology, width = self.topology, self.topology.cores_per_rank
        variables = topology.platform.environment(topology, process)
        each = [tuple(process.cores[i * width : (i + 1) * width]) for i in range(len(process.ranks))]
        return process.ranks, topology, variables, each, how

    def _start_actors(self) -> None:
        import ray

        assert self._placement is not None, "place() comes before spawn()"
        # max_restarts=0: a rank that came back alone would sit in no collective; the group restarts whole.
        options = {"max_restarts": 0, "scheduling_strategy": self._placement.strategy()}
        host = ray.remote(WorkerHost)
        for ranks in self.topology.processes[len(self._actors) :]:
            amounts = self.topology.resources(len(ranks))
            cpus = amounts.pop("CPU")
            self._actors.append(host.options(**options, num_cpus=cpus, resources=amounts).remote())

    async def _spawn_on_cores(self) -> list[int]:
        """Start the actors in the order of the cores that Ray gave them; the cores, ascending.

        A placement group holds the lowest ids that were free. If they are not an aligned run, a second placement group
        is made while the first keeps its ids, and so on. After `PLACE_ATTEMPTS` an unaligned run is accepted. A Serve
        replica cannot leave its placement group: it takes a second one beside it only where there is a gap.

        Raises:
            PlacementError: there are gaps, and no way around them was found.
        """
        assert self._placement is not None, "place() comes before spawn()"
        set_aside: list[tuple[Placement, list[int]]] = []
        try:
            while True:
                ids = await self._start_in_order()
                if is_aligned(ids):
                    return ids
                log.warning(
                    "Ray gave %s %s, which do not begin at a multiple of %d",
                    self._label,
                    describe(ids),
                    len(ids),
                )
                another = await self._another(is_run(ids)) if len(set_aside) < PLACE_ATTEMPTS else None
                if another is None:
                    break
                set_aside.append((self._placement, ids))
                self._placement = another
                await self.kill()
            if not is_run(ids):  # an earlier one may have been
                await self.kill()
                before = self._placement
                self._placement = next((placement for placement, own in set_aside if is_run(own)), before)
                if self._placement is not before:
                    before.release()
                    ids = await self._start_in_order()
            if is_run(ids):
                return ids
        finally:
            for placement, _ in set_aside:
                if placement is not self._placement:
                    placement.release()
        raise PlacementError(
            f"the {self._label} that are free, {describe(ids)}, are not neighbours: end what holds those between, or "
            f"use --tp {max(1, self.topology.tp // 2)}"
        )

    async def _start_in_order(self) -> list[int]:
        """Start the actors, order them by their cores, and return these."""
        self._start_actors()
        resource = self.topology.platform.resource
        owned = await _gather([actor.cores.remote(resource) for actor in self._actors], "cores")
        self._remember(await _gather([actor.pid.remote() for actor in self._actors], "pid"))
        order = sorted(range(len(owned)), key=lambda i: owned[i])
        self._actors = [self._actors[i] for i in order]
        ids = [core for i in order for core in owned[i]]
        if len(ids) != self.topology.tp * self.topology.cores_per_rank or ids != sorted(ids):
            raise PlacementError(f"Ray gave the ranks the {self._label} {describe(ids)}, not a set of neighbours each")
        return ids

    async def _another(self, usable: bool) -> Placement | None:
        """A further placement group for this group on its node, if there is room.

        usable: whether the present one can be used; then a replica does not hold the cores of two for a better one.
        """
        assert self._placement is not None, "place() comes before spawn()"
        if usable and not self._placement.own:
            return None
        another = Placement.make(self.topology)
        try:
            await asyncio.wait_for(another.ready(), PLACE_WAIT_S)
        except BaseException as e:
            another.release()
            if isinstance(e, asyncio.TimeoutError):
                return None
            raise
        return another

    @property
    def _label(self) -> str:
        """What a person calls the cores."""
        return self.topology.platform.resource_label

    @property
    def _cache(self) -> Path:
        """For what compilers of this machine make."""
        return cache_dir() / "neff"

    async def pin(self) -> list[WorkerInfo]:
        if not self.topology.platform.ray_assigns_cores:
            held = await self._on_all(Worker.pin)
            if not all(held):
                # Some ranks alone on a core and others sharing one would make every step as slow as the worst.
                await self._on_all(Worker.unpin)
                log.warning("no cores could be taken for %d ranks alone: they run unpinned", self.topology.tp)
        return await self._on_all(Worker.info)

    async def call(
        self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], at_once: int | None = None
    ) -> list[T]:
        name = method.__name__
        work = [
            (actor, arguments[ranks.start : ranks.stop])
            for actor, ranks in zip(self._actors, self.topology.processes, strict=True)
        ]
        work = [(actor, own) for actor, own in work if own]
        results: list[T] = []
        step = at_once or len(work)
        for start in range(0, len(work), step):
            refs = [actor.call.remote(name, own) for actor, own in work[start : start + step]]
            results += [result for own in await _gather(refs, name) for result in own]
        return results

    def _remember(self, pids: Iterable[int]) -> None:
        """Hold on to these processes, so that no later one with the same id is taken for one of them."""
        for pid in set(pids) - set(self._processes):
            with suppress(ProcessLookupError):  # it has ended already
                self._processes[pid] = os.pidfd_open(pid)

    async def kill(self) -> None:
        import ray

        actors, self._actors = self._actors, []
        ports, self._ports = self._ports, None
        try:
            for actor in actors:
                ray.kill(actor)  # not __ray_terminate__: it waits for the task that may be what hangs
            # A process ends when the driver has freed its cores, which may take long.
            limit_s = max(KILL_S, self.topology.platform.busy_limit_s)
            await asyncio.gather(*(_wait_gone(pid, fd, limit_s) for pid, fd in self._processes.items()))
            for fd in self._processes.values():
                os.close(fd)
            self._processes = {}  # not before they have gone: a kill that was interrupted is asked for again
        finally:
            if ports is not None:
                ports.release()

    def release(self) -> None:
        placement, self._placement = self._placement, None
        if placement is not None:
            placement.release()


async def _gather(refs: Sequence[Any], method: str) -> list[Any]:
    """The results of calls to all ranks at once; Ray's errors translated."""
    import ray

    try:
        return list(await asyncio.gather(*refs))
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, TprayError):
            raise e.cause from None  # the rank's own words; Ray's traceback adds nothing to them
        raise RankError(f"a rank failed in its phase {method!r}: {e.cause!r}") from e
    except ray.exceptions.RayError as e:
        raise RankError(f"a rank died in its phase {method!r}: {_first_sentence(e)}") from e


async def _wait_gone(pid: int, fd: int, timeout_s: float) -> None:
    """Wait until the process has ended, and see to it. fd: its pidfd. Source: pidfd_open(2).

    On the event loop and not on a thread: at the end of a script, when groups are stopped, no thread can be started.
    """
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, gone.set)
    try:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(gone.wait(), OBEY_S)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        await asyncio.wait_for(gone.wait(), timeout_s)
    except TimeoutError as e:
        raise GroupError(f"the rank with process id {pid} is still there {timeout_s:.0f} s after it was killed") from e
    finally:
        loop.remove_reader(fd)


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
