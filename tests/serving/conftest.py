"""An engine with the demo's tokenizer and labels on ranks that have no model: milliseconds a test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tpray.config import BatchConfig, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.engine import Engine

EngineWork = Callable[[Engine, FakeExecutor], Awaitable[None]]
WithEngine = Callable[..., None]


@pytest.fixture
def with_fake_engine() -> WithEngine:
    """A function that starts an engine on fake ranks, does some work with it, and stops it."""

    def run(
        work: EngineWork, step_timeout_s: float = 5.0, buckets: tuple[tuple[int, int], ...] = (), **limits: float
    ) -> None:
        async def main() -> None:
            executor = FakeExecutor(2)
            group = ClassifierGroup(ModelConfig(dtype="float32", buckets=buckets), executor, step_timeout_s)
            group._supervisor._pause_s = 0.01
            engine = Engine(group, BatchConfig.model_validate(limits))
            await engine.start()
            executor.steps.clear()
            try:
                await asyncio.wait_for(work(engine, executor), 20)
            finally:
                await engine.stop()

        asyncio.run(main())

    return run
