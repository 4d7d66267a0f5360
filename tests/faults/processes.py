"""Ranks that are processes of their own, without Ray: they can be stopped and killed, and start in seconds."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from tpray.group.executor import Worker, WorkerExecutor
from tpray.group.jobs import WorkerInfo
from tpray.group.worker_host import WorkerHost
from tpray.platforms.topology import Topology

T = TypeVar("T")

_host = WorkerHost()
"""Of the process that is a rank."""


def _begin(rank: int, topology: Topology) -> WorkerInfo:
    (info,) = _host.begin([rank], topology)
    return info


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    (result,) = _host.call(method, [arguments])
    return result


class ProcessExecutor(WorkerExecutor):
    """See `tpray.group.executor.Executor`. Its ranks are not pinned."""

    def __init__(self, topology: Topology | int) -> None:
        super().__init__(Topology(topology) if isinstance(topology, int) else topology)
        self._pools: list[ProcessPoolExecutor] = []
        self.pids: list[int] = []

    async def place(self) -> None:
        return None

    async def spawn(self) -> list[WorkerInfo]:
        self._pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(self.topology.tp)]
        work = [pool.submit(_begin, rank, self.topology) for rank, pool in enumerate(self._pools)]
        infos = list(await asyncio.gather(*map(asyncio.wrap_future, work)))
        self.pids = [info.pid for info in infos]
        return infos

    async def pin(self) -> list[WorkerInfo]:
        return await self._on_all(Worker.info)

    async def call(
        self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], at_once: int | None = None
    ) -> list[T]:
        work = [
            pool.submit(_call, method.__name__, own)
            for pool, own in zip(self._pools, arguments, strict=False)  # fewer arguments: the first ranks only
        ]
        return list(await asyncio.gather(*map(asyncio.wrap_future, work)))

    async def kill(self) -> None:
        pids, self.pids = self.pids, []
        pools, self._pools = self._pools, []
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pool in pools:
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)

    def release(self) -> None:
        return None
