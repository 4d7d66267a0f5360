"""Rows of 512 tokens and rows of 16 in one stream: what the long ones do to the latency of the short ones."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass

from tests.bench import traffic
from tpray.commands.load_generator import Generator, Load, Outcome

SHORT, LONG = 16, 512
SHORT_CLIENTS, LONG_CLIENTS = 32, 4
OPEN_SHARE = 0.4
"""Of the rate that the closed loop of short rows reaches: what an open loop sends of them."""


@dataclass(frozen=True)
class Mix:
    """Under one load of short rows, medians of rounds: their 99th percentile without and with long rows beside them,
    ms, and how many a second were answered of each in the mix."""

    name: str
    alone_p99_ms: float
    mixed_p99_ms: float
    short_per_s: float
    long_per_s: float


def measure(url: str, seconds: float, rounds: int) -> list[Mix]:
    """A closed and an open loop of short rows; `LONG_CLIENTS` clients send the long ones."""
    short = Generator(url, traffic.singles(256, SHORT), 60.0)
    long = Generator(url, traffic.singles(64, LONG), 60.0)

    def alone(load: Load) -> Outcome:
        return asyncio.run(short.run([load], seconds, 0.0, 10**6))[0]

    def together(load: Load) -> tuple[Outcome, Outcome]:
        async def both() -> tuple[Outcome, Outcome]:
            long_load = Load(concurrency=LONG_CLIENTS)
            ours, theirs = await asyncio.gather(
                short.run([load], seconds, 0.0, 10**6), long.run([long_load], seconds, 0.0, 10**6)
            )
            return ours[0], theirs[0]

        return asyncio.run(both())

    closed = Load(concurrency=SHORT_CLIENTS)
    alone(closed), together(closed)  # warms the server up
    opened = Load(rate=round(OPEN_SHARE * alone(closed).per_second, 1))
    found = []
    for name, load in ((f"{SHORT_CLIENTS} clients", closed), (f"{opened.rate:g}/s", opened)):
        runs = [(alone(load), *together(load)) for _ in range(rounds)]
        if errors := [o.errors for run in runs for o in run if o.errors]:
            raise RuntimeError(f"requests failed: {dict(errors[0])}")
        middle = statistics.median
        found.append(
            Mix(
                name,
                middle(run[0].percentile(99) for run in runs),
                middle(run[1].percentile(99) for run in runs),
                middle(run[1].per_second for run in runs),
                middle(run[2].per_second for run in runs),
            )
        )
    return found
