"""An engine on threads behind the routes, for tests of dialects whose answers are held against stock transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from tpray.config import BatchConfig, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.engine import Engine
from tpray.serving.http import make_app


def ask(directory: Path, work: Callable[[httpx.AsyncClient], Awaitable[None]], *served: str, **limits: Any) -> None:
    """Have ``work`` done with a client of a model that requests call ``served``."""

    async def run() -> None:
        group = ClassifierGroup(ModelConfig(source=str(directory), dtype="float32"), ThreadExecutor(2))
        engine = Engine(group, BatchConfig.model_validate(limits))
        await engine.start()
        try:
            transport = httpx.ASGITransport(make_app(engine, served=served))
            async with httpx.AsyncClient(transport=transport, base_url="http://tpray", timeout=60) as http:
                await work(http)
        finally:
            await engine.stop()

    asyncio.run(run())
