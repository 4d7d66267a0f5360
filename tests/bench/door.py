"""What a request costs in the replica: `tpray serve` of the demo beside a bare Serve application, which does nothing.

``python -m tests.bench.door``; both are started one after the other, on the same settings of HAProxy and Serve, and are
sent the same requests. CPU is the replica process's own, all its threads, user and system.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from tests.served import children_of
from tpray.commands.load_generator import Generator, Load

PAIR = ["The company HuggingFace is based in New York City", "HuggingFace's headquarters are situated in Manhattan"]
CONSTANT = b'[{"score":0.9771,"label":"paraphrase"},{"score":0.0229,"label":"not a paraphrase"}]'
CLIENTS = (1, 32)


@dataclass(frozen=True)
class Cost:
    """Of one load. cpu_ms: of the replica, a request. p50_ms: over HTTP."""

    clients: int
    requests: int
    cpu_ms: float
    p50_ms: float
    per_second: float


def serve_constant(port: int, kind: str) -> None:
    """Serve a constant on loopback until this process is ended; prints Ready.

    Args:
        kind: "bare", a deployment that answers a Starlette response, or "fastapi", a route of FastAPI.
    """
    from tpray.config import stay_quiet
    from tpray.local_ray.local import start_ray, stop_ray
    from tpray.platforms.lease import SERVER_PORTS, take_ports
    from tpray.serving import haproxy

    stay_quiet()
    folder, ports = Path(tempfile.mkdtemp(prefix="tpray-bench-")), take_ports(haproxy.PORTS, SERVER_PORTS)
    os.environ.update(haproxy.places(folder, ports.ids, "constant", {}) | haproxy.settings(60))
    start_ray(os.cpu_count() or 1, folder, ports)
    from ray import serve

    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(_constant(kind), route_prefix="/")
        print("Ready", flush=True)
        sys.stdin.read()  # ends with whoever started this
    finally:
        stop_ray()


def _constant(kind: str) -> Any:
    from fastapi import FastAPI
    from fastapi import Request as FastRequest
    from fastapi import Response as FastResponse
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1_000_000}
    if kind == "bare":

        class Constant:
            async def __call__(self, request: Request) -> Response:
                await request.body()
                return Response(CONSTANT, media_type="application/json")

        return cast(Any, serve.deployment(**options)(Constant)).bind()
    api = FastAPI()

    class Routed:
        @api.post("/predict")
        async def predict(self, request: FastRequest) -> FastResponse:
            await request.json()
            return FastResponse(CONSTANT, media_type="application/json")

    # FastAPI resolves the annotations of a method by its module's names.
    Routed.predict.__annotations__ = {"request": FastRequest, "return": FastResponse}
    return cast(Any, serve.deployment(**options)(serve.ingress(api)(Routed))).bind()


@contextmanager
def served(command: list[str]) -> Iterator[tuple[str, int]]:
    """Run a server until the end of the block; its URL, and the process of its replica."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    arguments = [word.replace("PORT", str(port)) for word in command]
    server = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said: list[str] = []
        for line in server.stdout:
            said.append(line)
            if "Ready" in line:
                break
        else:
            raise RuntimeError("".join(said[-5:]) or "it ended at once")
        (replica,) = (pid for pid in children_of(server.pid) if b"ray::ServeReplica" in _command(pid))
        yield f"http://127.0.0.1:{port}", replica
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def costs(url: str, replica: int, seconds: float, runs: int) -> list[Cost]:
    """Medians of ``runs`` of ``seconds`` each, at every number of clients."""
    generator = Generator(url, [PAIR])

    def once(clients: int) -> Cost:
        before = cpu_s(replica)
        (outcome,) = asyncio.run(generator.run([Load(concurrency=clients)], seconds, 0.0, 10**6))
        used, done = cpu_s(replica) - before, len(outcome.latencies_ms)
        assert not outcome.errors, outcome.errors
        return Cost(clients, done, used / done * 1e3, outcome.percentile(50), outcome.per_second)

    asyncio.run(generator.run([Load(concurrency=32)], 2.0, 0.0, 10**6))
    found = [[once(clients) for clients in CLIENTS] for _ in range(runs)]

    def middle(of: Callable[[Cost], float], index: int) -> float:
        return median(of(run[index]) for run in found)

    return [
        Cost(clients, round(middle(lambda c: c.requests, i)), middle(lambda c: c.cpu_ms, i),
             middle(lambda c: c.p50_ms, i), middle(lambda c: c.per_second, i))
        for i, clients in enumerate(CLIENTS)
    ]  # fmt: skip


SIDES = {
    "bare Serve": ["tests.bench.door", "--constant", "bare", "--port", "PORT"],
    "Serve with FastAPI": ["tests.bench.door", "--constant", "fastapi", "--port", "PORT"],
    "tpray": ["tpray", "serve", "--tp", "1", "--port", "PORT"],
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.door", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--runs", type=int, default=3, help="of each load; their median counts")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--profile", default="", help="a py-spy that records each replica under 32 clients")
    parser.add_argument("--constant", choices=("bare", "fastapi"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.constant:
        serve_constant(options.port, options.constant)
        return
    found: dict[str, list[Cost]] = {}
    for side in options.sides:
        with served(SIDES[side]) as (url, replica):
            found[side] = costs(url, replica, options.seconds, options.runs)
            for cost in found[side]:
                print(f"{side}: {json.dumps(cost.__dict__)}", flush=True)
            if options.profile:
                _profile(options.profile, url, replica, side)
    if "bare Serve" in found:
        for side, each in found.items():
            ratios = [
                f"{c.cpu_ms / b.cpu_ms:.2f}x at {c.clients}" for c, b in zip(each, found["bare Serve"], strict=True)
            ]
            print(f"{side}: CPU over bare Serve's {', '.join(ratios)}")


def _profile(spy: str, url: str, replica: int, side: str) -> None:
    for clients in CLIENTS:
        file = f"door-{side.replace(' ', '-')}-{clients}.txt"
        command = [spy, "record", "-p", str(replica), "-d", "6", "-r", "500", "-f", "raw", "-o", file]
        recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        asyncio.run(Generator(url, [PAIR]).run([Load(concurrency=clients)], 5.0, 0.0, 10**6))
        recorder.wait(60)


if __name__ == "__main__":
    main()
