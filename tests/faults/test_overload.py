"""Ten times what a group can do: it does what it can, refuses the rest at once, and says when to come back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.faults.overload_server import STEP_S
from tpray.commands.load_generator import Generator, Load, Outcome

ROWS_A_STEP = 4
CAPACITY = ROWS_A_STEP / STEP_S
"""Requests a second."""
MAX_QUEUE_S = 0.5
LIMITS = {"max_step_tokens": 4 * ROWS_A_STEP, "max_queue_s": MAX_QUEUE_S, "max_concurrent_requests": 512}
"""In number the queue could hold five seconds of work: the limit in time comes first."""


@contextmanager
def served(port: int, kind: str, **limits: float) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [f"{key}={value}" for key, value in limits.items()]
    process = subprocess.Popen([sys.executable, "-m", "tests.faults.overload_server", str(port), kind, *arguments])
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()


async def load(port: int, rate: float, seconds: float) -> tuple[Outcome, list[httpx.Response]]:
    """What the generator found, and some answers to others who asked meanwhile, with their headers."""
    url, others, done = f"http://127.0.0.1:{port}", [], asyncio.Event()

    async def ask() -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            while not done.is_set():
                others.append(await http.post(f"{url}/predict", json={"inputs": "a b"}))
                await asyncio.sleep(0.05)

    asking = asyncio.ensure_future(ask())
    (outcome,) = await Generator(url, ["a b"]).run([Load(rate=rate)], seconds, 0, int(rate * seconds * 2))
    done.set()
    await asking
    return outcome, others


def resident_mib(pid: int) -> float:
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_ten_times_the_capacity_costs_the_answers_of_those_who_are_refused_only(free_port: Callable[[], int]) -> None:
    port = free_port()
    with served(port, "fake", **LIMITS) as process:
        once, _ = asyncio.run(load(port, CAPACITY, 4))
        asyncio.run(load(port, 10 * CAPACITY, 1.5))
        before_mib = resident_mib(process.pid)
        tenfold, others = asyncio.run(load(port, 10 * CAPACITY, 4))
        grown_mib = resident_mib(process.pid) - before_mib
        assert httpx.get(f"http://127.0.0.1:{port}/health?deep", timeout=30).status_code == 200
        calm = httpx.post(f"http://127.0.0.1:{port}/predict", json={"inputs": "a b"}, timeout=30)
    best = max(once.per_second, tenfold.per_second)
    for outcome in (once, tenfold):
        print(f"\n{json.dumps(outcome.summary())}")
    print(
        f"goodput at ten times the capacity: {tenfold.per_second / best:.0%} of the best, {tenfold.per_second:.0f}/s "
        f"of {CAPACITY}/s; 99 % within {tenfold.percentile(99):.0f} ms of {MAX_QUEUE_S * 1e3:.0f}; {grown_mib:+.1f} MiB"
    )

    assert set(once.errors) | set(tenfold.errors) <= {"HTTP 429"}
    assert tenfold.errors["HTTP 429"] > len(tenfold.latencies_ms), "most are refused"
    assert grown_mib < 50
    assert calm.status_code == 200
    assert {answer.status_code for answer in others} <= {200, 429}
    refused = [answer for answer in others if answer.status_code == 429]
    assert refused
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert "try again later" in answer.json()["error"]
