"""A group without a model, for what all groups have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from tpray.group.fake_executor import FakeExecutor, fake_logits
from tpray.group.group import Group
from tpray.group.phases import PhaseReport
from tpray.group.wire import Array

IDS = np.array([[3, 1, 4], [1, 5, 0]])
MASK = (IDS != 0).astype(np.int64)
INPUTS: Sequence[Array] = (IDS, MASK, MASK * 0)


class PlainGroup(Group):
    """Its ranks load nothing, and its check is one step."""

    async def _resolve(self) -> None:
        return None

    async def _prepare(self) -> None:
        await self._phase("check", self._check())

    async def _check(self) -> None:
        assert np.array_equal((await self._run(INPUTS)).logits, fake_logits(IDS, MASK))


Work = Callable[[PlainGroup, FakeExecutor], Awaitable[None]]
WithGroup = Callable[..., None]


@pytest.fixture
def with_group() -> WithGroup:
    """A function that starts a group of fake ranks, does some work with it, and stops it."""

    def run(
        work: Work, tp: int = 2, step_timeout_s: float = 5.0, progress: Callable[[PhaseReport], None] | None = None
    ) -> None:
        async def main() -> None:
            executor = FakeExecutor(tp)
            group = PlainGroup(executor, step_timeout_s, progress)
            group._supervisor._pause_s = 0.01
            await group.start()
            try:
                await asyncio.wait_for(work(group, executor), 10)
            finally:
                await group.stop()

        asyncio.run(main())

    return run
