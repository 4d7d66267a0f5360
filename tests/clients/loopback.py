"""A server on loopback without Ray: a real model on threads of this process, behind uvicorn."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from tpray.config import BatchConfig, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.access import Access
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.http import make_app


@dataclass
class Loopback:
    """url: without a slash at its end. loop: on which engine and gate are used."""

    url: str
    engine: Engine
    gate: Gate
    loop: asyncio.AbstractEventLoop


@contextmanager
def loopback(
    directory: Path | None = None,
    tp: int = 2,
    wrap: Callable[[Any], Any] = lambda app: app,
    access: Access | None = None,
    **limits: Any,
) -> Iterator[Loopback]:
    """Serve the model in ``directory``, or the demo, in float32. wrap: puts something in front of the application."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready, running = threading.Event(), list[Loopback]()
    server = uvicorn.Server(uvicorn.Config("", log_level="error", lifespan="off"))
    failed: list[BaseException] = []

    async def main() -> None:
        source = None if directory is None else str(directory)
        group = ClassifierGroup(ModelConfig(source=source, dtype="float32"), ThreadExecutor(tp))
        engine, gate = Engine(group, BatchConfig.model_validate(limits)), Gate()
        await engine.start()
        try:
            server.config.app = wrap(make_app(engine, gate, access=access))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            running.append(Loopback(url, engine, gate, asyncio.get_running_loop()))
            ready.set()
            await server.serve([listener])
        finally:
            await engine.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as e:  # noqa: BLE001  # told to the test's thread
            failed.append(e)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(120)
        if failed:
            raise failed[0]
        while not server.started:
            time.sleep(0.01)
        yield running[0]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
