"""How ranks come to be: as Ray actors, or as threads of this process.

`Ranks` is what `group.ShardGroup` needs of them. `RayRanks` is the real thing; `ThreadRanks` runs the same
`ShardWorker`, wire and collective without Ray, for tests and for looking at a group in a debugger.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tpray.config import RuntimeName, cache_dir
from tpray.errors import GroupError, PlacementError, RankError, TprayError
from tpray.group import lease
from tpray.group.cores import describe, is_aligned, is_run
from tpray.group.host import RankHost
from tpray.group.lease import CoreLease
from tpray.group.placement import Layout, Placement
from tpray.group.worker import RankInfo, ShardWorker
from tpray.runtime.neuron_env import NeuronPlace, environment, neff_cache

log = logging.getLogger("tpray.group.ranks")

PLACE_ATTEMPTS = 8
PLACE_WAIT_S = 5.0


class Ranks(Protocol):
    """The ``tp`` ranks of one group."""

    tp: int
    runtime: RuntimeName
    pins: bool  # whether the ranks are processes, which can be kept on CPU cores of their own

    async def place(self) -> None:
        """Reserve what the ranks need."""
        ...

    async def spawn(self) -> list[RankInfo]:
        """Bring the ranks up, in the reserved place; again after `kill`."""
        ...

    async def call(
        self,
        method: str,
        *args: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        at_once: int | None = None,
    ) -> list[Any]:
        """Call a `ShardWorker` method on every rank.

        Args:
            each: arguments of every rank's own, instead of ``args``.
            at_once: how many processes work at a time; the default is all.

        Raises:
            TprayError: what a rank raised, as it raised it.
            RankError: a rank died, or raised something unexpected.
        """
        ...

    async def kill(self) -> None:
        """End every rank and wait until it has ended."""
        ...

    def release(self) -> None:
        """Give back what `place` reserved."""
        ...


class RayRanks:
    """Ranks in Ray actors, all in one placement group."""

    def __init__(self, layout: Layout) -> None:
        self.tp, self.runtime = layout.tp, layout.runtime
        self.pins = not layout.on_neuron  # there Ray has given out the cores
        self._layout = layout
        self._placement: Placement | None = None
        self._ports: CoreLease | None = None
        self._actors: list[Any] = []
        self._pids: list[int] = []

    async def place(self) -> None:
        if self._placement is None:
            self._placement = await Placement.acquire(self._layout)
            await self._placement.ready()

    async def spawn(self) -> list[RankInfo]:
        layout = self._layout
        if not layout.on_neuron:
            self._start_actors()
            begin = [(ranks, layout.tp, layout.runtime, layout.threads) for ranks in layout.ranks_of]
        else:
            cores = await self._spawn_on_cores()
            self._ports = lease.take_ports()
            shutil.rmtree(neff_cache(self._neffs, self._meet), ignore_errors=True)  # an earlier group's
            begin = [self._begin_on(ranks, cores) for ranks in layout.ranks_of]
        calls = [actor.begin.remote(*arguments) for actor, arguments in zip(self._actors, begin, strict=True)]
        infos = [info for infos in await _gather(calls, "begin") for info in infos]
        self._pids = sorted({info.pid for info in infos})
        return infos

    def _start_actors(self) -> None:
        import ray

        assert self._placement is not None, "place() comes before spawn()"
        # max_restarts=0: a rank that came back alone would sit in no collective; the group restarts whole.
        options = {"max_restarts": 0, "scheduling_strategy": self._placement.strategy()}
        host = ray.remote(RankHost)
        self._actors = [host.options(**options, **self._layout.options(r)).remote() for r in self._layout.ranks_of]

    async def _spawn_on_cores(self) -> list[int]:
        """Start the actors in the order of the NeuronCores that Ray gave them; the cores, ascending.

        A placement group has certain ids, the lowest that were free. If these are no aligned run, another placement
        group is made while this one keeps them, and so on; at last a run that is not aligned will do. A Serve replica
        lives in its placement group and keeps it: only a gap is worth a second one, beside it.

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
                log.warning("Ray gave NeuronCores %s, which do not begin at a multiple of %d", describe(ids), len(ids))
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
            f"the NeuronCores that are free, {describe(ids)}, are not neighbours: end what holds those between, or "
            f"use --tp {max(1, self.tp // 2)}"
        )

    async def _start_in_order(self) -> list[int]:
        """Start the actors, order them by their cores, and return these."""
        self._start_actors()
        owned = await _gather([actor.cores.remote() for actor in self._actors], "cores")
        self._pids = await _gather([actor.pid.remote() for actor in self._actors], "pid")
        order = sorted(range(len(owned)), key=lambda i: owned[i])
        self._actors = [self._actors[i] for i in order]
        ids = [core for i in order for core in owned[i]]
        if len(ids) != self.tp * self._layout.width or ids != sorted(ids):
            raise PlacementError(f"Ray gave the ranks the NeuronCores {describe(ids)}, not a set of neighbours each")
        return ids

    async def _another(self, will_do: bool) -> Placement | None:
        """A further placement group for this group on its node, if there is room.

        will_do: whether the present one will do, so that a replica should not hold the cores of two for a better one.
        """
        assert self._placement is not None, "place() comes before spawn()"
        if will_do and not self._placement.own:
            return None
        another = Placement.make(self._layout)
        try:
            await asyncio.wait_for(another.ready(), PLACE_WAIT_S)
        except BaseException as e:
            another.release()
            if isinstance(e, asyncio.TimeoutError):
                return None
            raise
        return another

    @property
    def _meet(self) -> tuple[int, int]:
        """The group's two ports."""
        assert self._ports is not None, "spawn() takes them"
        first, second = self._ports.cores
        return first, second

    @property
    def _neffs(self) -> Path:
        return cache_dir() / "neff"

    def _begin_on(self, ranks: range, cores: Sequence[int]) -> tuple[Any, ...]:
        layout, width = self._layout, self._layout.width
        own = cores[ranks.start * width : ranks.stop * width]
        variables = environment(own, ranks, layout.tp, self._meet, layout.lnc, self._neffs)
        each = [tuple(cores[rank * width : (rank + 1) * width]) for rank in ranks]
        alone = len(ranks) == 1 and layout.processes == "process-per-rank"
        places = [NeuronPlace(layout.family, layout.lnc, None if alone else i * width) for i in range(len(ranks))]
        return ranks, layout.tp, layout.runtime, layout.threads, variables, places, each

    async def call(
        self,
        method: str,
        *args: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        at_once: int | None = None,
    ) -> list[Any]:
        arguments = list(each) if each is not None else [args] * self.tp
        split = [arguments[ranks.start : ranks.stop] for ranks in self._layout.ranks_of]
        work = [(actor, own) for actor, own in zip(self._actors, split, strict=False) if own]
        results: list[Any] = []
        step = at_once or len(work)
        for start in range(0, len(work), step):
            refs = [actor.call.remote(method, own) for actor, own in work[start : start + step]]
            results += [result for own in await _gather(refs, method) for result in own]
        return results

    async def kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)  # not __ray_terminate__: it waits for the task that may be what hangs
        self._actors = []
        pids, self._pids = self._pids, []
        ports, self._ports = self._ports, None
        try:
            await asyncio.gather(*map(_wait_gone, pids))
        finally:
            if ports is not None:
                ports.release()

    def release(self) -> None:
        if self._placement is not None:
            self._placement.release()
            self._placement = None


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


class ThreadRanks:
    """Ranks that are threads of this process; they are not pinned, and `kill` cannot interrupt a step."""

    pins = False

    def __init__(self, tp: int, runtime: RuntimeName = "cpu", threads: int = 1) -> None:
        self.tp, self.runtime = tp, runtime
        self._threads = threads
        self._host = RankHost()

    @property
    def workers(self) -> list[ShardWorker]:
        """The ranks themselves."""
        return self._host.workers

    async def place(self) -> None:
        return None

    async def spawn(self) -> list[RankInfo]:
        self._host = RankHost()
        return self._host.begin(range(self.tp), self.tp, self.runtime, self._threads, exit_process=_stay)

    async def call(
        self,
        method: str,
        *args: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        at_once: int | None = None,
    ) -> list[Any]:
        return await asyncio.to_thread(self._host.call, method, each if each is not None else [args] * self.tp)

    async def kill(self) -> None:
        self._host.workers = []

    def release(self) -> None:
        return None


def _stay(status: int) -> None:
    """A rank that is a thread ends with its loop; its process goes on."""


async def _wait_gone(pid: int, timeout_s: float = 10.0) -> None:
    """Wait until the process has ended. Source: pidfd_open(2).

    On the event loop and not on a thread: at the end of a script, when groups are stopped, no thread can be started.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), timeout_s)
    except asyncio.TimeoutError as e:
        raise GroupError(f"the rank with process id {pid} is still there {timeout_s:.0f} s after it was killed") from e
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
