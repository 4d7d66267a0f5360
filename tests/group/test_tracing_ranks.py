"""Where tracing takes no cores, ranks that trace come up for it and go, and others load."""

from __future__ import annotations

import asyncio

import pytest

from tests.group.conftest import PlainGroup
from tpray.errors import GroupError
from tpray.group.fake_executor import FakeExecutor
from tpray.group.jobs import WorkerInfo
from tpray.platforms.topology import Topology

CORES = Topology(2, "neuron-xla", instance_family="trn1")


class TracingGroup(PlainGroup):
    """It traces, which takes no time, unless it was given something to load."""

    _must_trace = True

    async def _prepare(self) -> None:
        await self._trace_phase(lambda: asyncio.sleep(0))
        self._must_trace = False
        await super()._prepare()


class Seen(FakeExecutor):
    """Keeps whether its ranks traced, each time that they came up."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.spawned: list[bool] = []

    async def spawn(self) -> list[WorkerInfo]:
        self.spawned.append(self.topology.tracing)
        return await super().spawn()


def test_ranks_that_trace_give_way_to_those_that_load() -> None:
    async def main() -> None:
        executor = Seen(CORES)
        group = TracingGroup(executor)
        await group.start()
        assert executor.spawned == [True, False]
        assert executor.calls[:8] == ["place", "spawn", "pin", "connect", "kill", "spawn", "pin", "connect"]
        await group.stop()

    asyncio.run(main())


def test_on_cpu_cores_the_ranks_that_trace_load() -> None:
    async def main() -> None:
        executor = Seen(Topology(2))
        group = TracingGroup(executor)
        await group.start()
        assert executor.spawned == [False]
        await group.stop()

    asyncio.run(main())


def test_a_start_that_is_stopped_while_its_ranks_change_brings_none_up() -> None:
    async def main() -> None:
        executor = Seen(CORES)
        group = TracingGroup(executor)
        killing = executor.block("kill")
        starting = asyncio.create_task(group.start())
        while "kill" not in executor.calls:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(group.stop())
        await asyncio.sleep(0.05)
        killing.set()
        await stopping
        with pytest.raises(GroupError, match="the group was stopped"):
            await starting
        assert executor.spawned == [True]

    asyncio.run(asyncio.wait_for(main(), 20))
