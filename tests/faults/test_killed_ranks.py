"""Ranks of a real server that are killed or stopped again and again, under clients that count their answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import pytest

from tests.faults.clients import Tally
from tests.served import Running, start
from tpray.group.pace import FLOOR_S

pytestmark = pytest.mark.ray

BODIES: list[dict[str, Any]] = [
    {"inputs": [[f"text {i}"], [f"number {i} " + "and more " * (i % 13), "a pair"]], "raw_scores": True}
    for i in range(50)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Running]:
    running = start(free_port(), tmp_path_factory.mktemp("server"), "--tp", "2", "--dtype", "float32")
    yield running
    running.process.send_signal(signal.SIGINT)
    running.process.wait(60)


def scores(answer: httpx.Response) -> list[dict[str, float]]:
    return [{score["label"]: score["score"] for score in item} for item in answer.json()]


def pid_of(server: Running, rank: int) -> int | None:
    """A rank's process; None while the group restarts."""
    info = server.info()
    return int(info["ranks"][rank]["pid"]) if info["state"] == "ready" else None


SECONDS = 15
"""For which ranks are killed; `make soak` goes on for an hour."""


def test_nothing_is_lost_or_wrong_while_ranks_are_killed(server: Running, report: Callable[[str, Tally], None]) -> None:
    """Eight clients; a rank is killed every 5 s, but not before the group was back for a second."""
    wanted = [scores(server.predict(body)) for body in BODIES]
    restarts = server.info()["restarts"]
    numbers, done, found, slowest = count(), threading.Event(), Counter[str](), 0.0

    def client() -> None:
        nonlocal slowest
        with httpx.Client(timeout=60) as http:  # httpx.post makes a TLS context for each request
            while not done.is_set():
                i = next(numbers) % len(BODIES)
                began = time.monotonic()
                answer = http.post(f"{server.url}/predict", json=BODIES[i])
                slowest = max(slowest, time.monotonic() - began)
                near = [pytest.approx(item, abs=1e-4) for item in wanted[i]]
                right = answer.status_code == 200 and scores(answer) == near
                found["right" if right else f"{answer.status_code} {answer.text[:200]}"] += 1

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        killed, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            pid = pid_of(server, killed % 2)
            if pid is not None:
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
                killed += 1
                time.sleep(4)
            time.sleep(0.1)
        done.set()
        for each in clients:
            each.result(timeout=90)
    while pid_of(server, 0) is None:
        time.sleep(0.1)
    print(f"{killed} killed, {dict(found)}, the slowest answer took {slowest:.1f} s")
    right = found.pop("right", 0)
    report(f"a rank killed every 5 s, {SECONDS} s", Tally(right, lost=found, longest_s=slowest, recovered_s=slowest))
    assert not found
    assert server.info()["restarts"] - restarts == killed


def test_a_stopped_rank_is_noticed_and_a_client_in_a_hurry_is_told_in_time(server: Running) -> None:
    """By us, with the dialect's 504: Serve reads the header too, and would answer 408."""
    for _ in range(3):  # so that steps of this size were measured
        server.predict(BODIES[0])
    restarts = server.info()["restarts"]
    pid = pid_of(server, 1)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        patient = pool.submit(server.predict, BODIES[0], headers={"x-request-timeout-seconds": "40"})
        late = server.predict(BODIES[1], headers={"x-request-timeout-seconds": "1"})
        assert 0.8 < time.monotonic() - began < 1.5
        assert (late.status_code, late.json()["error_type"]) == (504, "Backend")
        assert late.json()["error"] == "the request was not answered within 1 s"
        while server.info()["state"] == "ready":
            assert time.monotonic() - began < FLOOR_S + 30  # twice FLOOR_S, where others keep the cores busy
            time.sleep(0.1)
        noticed_s = time.monotonic() - began
        assert patient.result(timeout=60).status_code == 200
        print(f"noticed after {noticed_s:.1f} s, answered after {time.monotonic() - began:.1f} s")
    assert server.info()["restarts"] == restarts + 1
