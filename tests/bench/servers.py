"""Servers in processes of their own, tpray's and others', and what requests they answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tpray.commands.load_generator import Generator, Load, Outcome

START_LIMIT_S = 240.0


@contextmanager
def server(command: Sequence[str]) -> Iterator[str]:
    """Run a command until the end of the block; its URL. ``PORT`` in it becomes a free port.

    Raises:
        RuntimeError: it ended, or did not say Ready; with its last words.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [word.replace("PORT", port) for word in command]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
        try:
            give_up = time.monotonic() + START_LIMIT_S
            while "Ready" not in (said := _read(log)):
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{' '.join(command)} did not start: {said.strip()[-300:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)  # closes its standard input too


def _read(log: Any) -> str:
    log.seek(0)
    return str(log.read())


@dataclass(frozen=True)
class Point:
    """What a server did under a load: medians of several runs. Milliseconds and units a second."""

    clients: int
    p50_ms: float
    p99_ms: float
    per_second: float
    tokens_per_s: float


def load(
    url: str, inputs: Sequence[Any], clients: Sequence[int], seconds: float, rounds: dict[int, int]
) -> dict[int, Point]:
    """Send ``inputs`` in closed loops, after a warm-up; a point for each number of clients.

    Args:
        rounds: how often each number of clients is run; once where it is not named. The runs take turns.

    Raises:
        RuntimeError: requests failed.
    """
    generator = Generator(url, inputs, 60.0)
    asyncio.run(generator.run([Load(concurrency=32)], seconds, 0.0, 10**6))
    runs: dict[int, list[Outcome]] = {n: [] for n in clients}
    for turn in range(max(rounds.get(n, 1) for n in clients)):
        loads = [Load(concurrency=n) for n in clients if turn < rounds.get(n, 1)]
        for outcome in asyncio.run(generator.run(loads, seconds, 0.0, 10**6)):
            if outcome.errors or not outcome.latencies_ms:
                raise RuntimeError(f"at {outcome.load.name} requests failed: {dict(outcome.errors)}")
            runs[outcome.load.concurrency].append(outcome)
    return {n: _point(n, outcomes) for n, outcomes in runs.items()}


def _point(clients: int, outcomes: list[Outcome]) -> Point:
    middle = statistics.median
    return Point(
        clients,
        middle(o.percentile(50) for o in outcomes),
        middle(o.percentile(99) for o in outcomes),
        middle(o.per_second for o in outcomes),
        middle(o.tokens_per_second for o in outcomes),
    )
