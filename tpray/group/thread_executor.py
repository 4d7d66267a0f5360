"""Ranks that are threads of this process: the real ones without Ray, for a single rank that answers once, for tests and
for a debugger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from tpray.group.daemon import on_daemon_thread
from tpray.group.executor import WorkerExecutor
from tpray.group.jobs import WorkerInfo
from tpray.group.worker import ShardWorker
from tpray.group.worker_host import WorkerHost
from tpray.platforms.topology import Topology

T = TypeVar("T")


class ThreadExecutor(WorkerExecutor):
    """See `tpray.group.executor.Executor`. Its ranks are not pinned, and `kill` cannot interrupt a step."""

    def __init__(self, topology: Topology | int) -> None:
        """topology: or a degree, on CPU cores."""
        super().__init__(Topology(topology) if isinstance(topology, int) else topology)
        self._host = WorkerHost()

    @property
    def workers(self) -> list[ShardWorker]:
        """The ranks themselves."""
        return self._host.workers

    async def place(self) -> None:
        return None

    async def spawn(self) -> list[WorkerInfo]:
        self._host = WorkerHost()
        return self._host.begin(range(self.topology.tp), self.topology, exit_process=_stay)

    async def pin(self) -> list[WorkerInfo]:
        return [worker.info() for worker in self.workers]

    async def call(
        self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], at_once: int | None = None
    ) -> list[T]:
        work = partial(self._host.call, method.__name__, arguments)
        made: list[T] = await asyncio.wrap_future(on_daemon_thread(work, "tpray-ranks"))
        return made

    async def kill(self) -> None:
        for worker in self.workers:
            worker.end()
        self._host.workers = []

    def release(self) -> None:
        return None


def _stay(status: int) -> None:
    """A rank that is a thread ends with its loop; its process goes on."""
