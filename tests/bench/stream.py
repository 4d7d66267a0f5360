"""Texts of 8, 64 and 512 tokens in one stream, over HTTP and by a Serve handle, and what became of them."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.bench import traffic
from tests.bench.nodes import REQUEST_S

MIX = {8: 0.6, 64: 0.3, 512: 0.1}
"""Tokens of a request, and the share of requests that have so many."""

Ask = Callable[[str], Awaitable[str]]
"""Sends a text; what became of it: "200", another status, or an error's name."""


class Outcome(NamedTuple):
    """Of one request. due: when it was to be sent, seconds. seconds: from then to the answer. what: as `Ask` says."""

    due: float
    tokens: int
    seconds: float
    what: str


FIRST: dict[str, Any] = {}
"""The first answer to each text: every group is to give the same."""


def texts() -> dict[int, list[str]]:
    return {length: traffic.singles(32, length) for length in MIX}


async def open_loop(ask: Ask, rate: float, seconds: float, seed: int) -> list[Outcome]:
    """Requests of `MIX` at a rate, Poisson: when each was due, its tokens, how long it took, what became of it."""
    rng, made, outcomes = random.Random(seed), texts(), list[Outcome]()
    started = time.perf_counter()
    due, tasks = started, list[asyncio.Future[None]]()

    async def one(due: float, tokens: int, text: str) -> None:
        what = await ask(text)
        outcomes.append(Outcome(due - started, tokens, time.perf_counter() - due, what))

    while (due := due + rng.expovariate(rate)) < started + seconds:
        (tokens,) = rng.choices(list(MIX), list(MIX.values()))
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(due, tokens, rng.choice(made[tokens]))))
    await asyncio.gather(*tasks)
    return outcomes


async def over_http(port: int, rate: float, seconds: float, seed: int) -> list[Outcome]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=REQUEST_S + 10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def ask(text: str) -> str:
            try:
                async with session.post(f"http://127.0.0.1:{port}/predict", json={"inputs": text}) as answer:
                    body = await answer.json(content_type=None)
            except (TimeoutError, aiohttp.ClientError) as e:
                return type(e).__name__
            if answer.status == 200 and FIRST.setdefault(text, body) != body:
                return "wrong"
            return str(answer.status)

        return await open_loop(ask, rate, seconds, seed)


async def over_handle(handle: Any, rate: float, seconds: float, seed: int) -> list[Outcome]:
    async def ask(text: str) -> str:
        try:
            await handle.classify.remote(text)
        except Exception as e:  # noqa: BLE001  # counted by its kind
            return type(e).__name__
        return "200"

    return await open_loop(ask, rate, seconds, seed)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Percentiles of the answered by length, milliseconds, and what became of all."""
    found: dict[str, Any] = {"outcomes": dict(Counter(what for *_, what in outcomes))}
    for tokens in MIX:
        took = [seconds * 1e3 for _, length, seconds, what in outcomes if length == tokens and what == "200"]
        if took:
            found[str(tokens)] = [round(float(np.percentile(took, share))) for share in (50, 99)]
    return found


def medians(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several runs' percentiles; and their outcomes together."""
    outcomes = sum((Counter(run["outcomes"]) for run in made), Counter[str]())
    return {"outcomes": dict(outcomes)} | {
        str(n): [statistics.median(run[str(n)][i] for run in made) for i in (0, 1)] for n in MIX
    }


def keep_asking(port: int, rate: float, stop: threading.Event, outcomes: list[Outcome]) -> None:
    """Ask until ``stop``; the outcomes' times are of the clock."""
    while not stop.is_set():
        began = time.monotonic()
        part = asyncio.run(over_http(port, rate, 5, 1))
        outcomes.extend(each._replace(due=began + each.due) for each in part)
