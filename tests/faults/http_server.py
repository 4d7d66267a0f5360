"""The real HTTP application of one replica, under uvicorn on loopback: the demo's tokenizer, ranks without a model.

Run as ``python -m tests.faults.http_server``; it prints its port. Arguments are limits: ``request_timeout_s=5``.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import sys

import uvicorn

from tpray.config import BatchConfig, ModelConfig, stay_quiet
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.engine import Engine
from tpray.serving.http import make_app

MOST_MEMORY = 6 << 30
"""Address space of this process: a fault of this kind once took 20 GB of the machine that ran the tests."""


async def serve(limits: dict[str, str]) -> None:
    """Serve until the process is ended."""
    engine = Engine(ClassifierGroup(ModelConfig(dtype="float32"), FakeExecutor(2)), BatchConfig.model_validate(limits))
    await engine.start()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(engine), log_level="warning", timeout_graceful_shutdown=1))
        print(listener.getsockname()[1], flush=True)
        await server.serve([listener])
    await engine.stop()


if __name__ == "__main__":
    stay_quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    asyncio.run(serve(dict(argument.split("=", 1) for argument in sys.argv[1:])))
