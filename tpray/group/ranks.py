"""How ranks come to be: as Ray actors, or as threads of this process.

`Ranks` is what `group.ShardGroup` needs of them. `RayRanks` is the real thing; `ThreadRanks` runs the same
`ShardWorker`, wire and collective without Ray, for tests and for looking at a group in a debugger.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, Protocol

from tpray.config import RuntimeName
from tpray.errors import GroupError, RankError, TprayError
from tpray.group.placement import Placement
from tpray.group.worker import RankInfo, ShardWorker


class Ranks(Protocol):
    """The ``tp`` ranks of one group."""

    tp: int
    pins: bool  # whether the ranks are processes, which can be kept on cores of their own

    async def place(self) -> None:
        """Reserve what the ranks need."""
        ...

    async def spawn(self) -> list[RankInfo]:
        """Bring the ranks up, in the reserved place; again after `kill`."""
        ...

    async def call(self, method: str, *args: Any, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Call a `ShardWorker` method on every rank at once; ``each`` gives every rank arguments of its own.

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
    """Ranks that are Ray actors in one placement group."""

    pins = True

    def __init__(self, tp: int, runtime: RuntimeName, threads: int) -> None:
        self.tp = tp
        self._runtime, self._threads = runtime, threads
        self._placement: Placement | None = None
        self._actors: list[Any] = []
        self._pids: list[int] = []

    async def place(self) -> None:
        if self._placement is None:
            self._placement = await Placement.acquire(self.tp, self._threads)
            await self._placement.ready()

    async def spawn(self) -> list[RankInfo]:
        import ray

        assert self._placement is not None, "place() comes before spawn()"
        # max_restarts=0: a rank that came back alone would sit in no collective; the group restarts whole.
        actor = ray.remote(ShardWorker).options(
            num_cpus=self._threads, max_restarts=0, scheduling_strategy=self._placement.strategy()
        )
        self._actors = [actor.remote(rank, self.tp, self._runtime, self._threads) for rank in range(self.tp)]
        infos: list[RankInfo] = await self.call("info")
        self._pids = [info.pid for info in infos]
        return infos

    async def call(self, method: str, *args: Any, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        import ray

        arguments = each if each is not None else [args] * self.tp
        refs = [getattr(actor, method).remote(*a) for actor, a in zip(self._actors, arguments, strict=False)]
        try:
            return list(await asyncio.gather(*refs))
        except ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, TprayError):
                raise e.cause from None  # the rank's own words; Ray's traceback adds nothing to them
            raise RankError(f"a rank failed in its phase {method!r}: {e.cause!r}") from e
        except ray.exceptions.RayError as e:
            raise RankError(f"a rank died in its phase {method!r}: {_first_sentence(e)}") from e

    async def kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)  # not __ray_terminate__: it waits for the task that may be what hangs
        self._actors = []
        pids, self._pids = self._pids, []
        await asyncio.gather(*map(_wait_gone, pids))

    def release(self) -> None:
        if self._placement is not None:
            self._placement.release()
            self._placement = None


_ONE_AT_A_TIME = ("trace", "load", "try_trace_function", "load_function")
"""What uses torch.export, which is not safe in two threads at once."""


class ThreadRanks:
    """Ranks that are threads of this process; they are not pinned, and `kill` cannot interrupt a step."""

    pins = False

    def __init__(self, tp: int, runtime: RuntimeName = "cpu", threads: int = 1) -> None:
        self.tp = tp
        self._runtime, self._threads = runtime, threads
        self.workers: list[ShardWorker] = []

    async def place(self) -> None:
        return None

    async def spawn(self) -> list[RankInfo]:
        self.workers = [
            ShardWorker(rank, self.tp, self._runtime, self._threads, exit_process=_stay) for rank in range(self.tp)
        ]
        return [worker.info() for worker in self.workers]

    async def call(self, method: str, *args: Any, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        arguments = each if each is not None else [args] * self.tp
        bound = [getattr(worker, method) for worker in self.workers]
        if method in _ONE_AT_A_TIME:
            return [await asyncio.to_thread(f, *a) for f, a in zip(bound, arguments, strict=False)]
        calls = (asyncio.to_thread(f, *a) for f, a in zip(bound, arguments, strict=False))
        return list(await asyncio.gather(*calls))

    async def kill(self) -> None:
        self.workers = []

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
