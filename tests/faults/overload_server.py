"""A server without Ray, for loads: ``python -m tests.faults.overload_server PORT fake|threads [KEY=VALUE ...]``.

``fake`` are two ranks without a model that take `STEP_S` for every step, so that the capacity is known; ``threads`` run
the demo. The keys are those of `BatchConfig`.
"""

from __future__ import annotations

import asyncio
import sys

import uvicorn

from tpray.config import BatchConfig, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.engine import Engine
from tpray.serving.http import make_app

STEP_S = 0.04


async def serve(port: int, kind: str, limits: dict[str, str]) -> None:
    executor = FakeExecutor(2) if kind == "fake" else ThreadExecutor(1)
    config = BatchConfig.model_validate(limits)
    engine = Engine(ClassifierGroup(ModelConfig(dtype="float32"), executor, config.step_timeout_s), config)
    await engine.start()
    if isinstance(executor, FakeExecutor):
        executor.delay(0, STEP_S)
    try:
        await uvicorn.Server(uvicorn.Config(make_app(engine), port=port, log_level="warning")).serve()
    finally:
        await engine.stop()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2], dict(pair.split("=") for pair in sys.argv[3:])))
