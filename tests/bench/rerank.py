"""Reranking 100 documents of mixed lengths for one query: one request, a request for each pair, and CrossEncoder."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import httpx

from tests.bench.traffic import WORDS
from tpray.config import DtypeName

DOCUMENTS = 100
CLIENTS = 32
"""How many pairs are under way at once where each is a request."""


def texts(seed: int = 0) -> tuple[str, list[str]]:
    """A query of 12 words, and documents of 8 to 240: as passages are, most of them short and some long."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(words))

    return text(12), [text(min(240, max(8, round(rng.lognormvariate(4, 0.7))))) for _ in range(DOCUMENTS)]


def over_http(url: str, rounds: int) -> dict[str, float]:
    """Seconds for all documents: in one request, and in one for each pair, many at once or one by one; medians."""

    async def in_one(client: httpx.AsyncClient, seed: int) -> None:
        query, documents = texts(seed)
        answer = await client.post("/rerank", json={"query": query, "texts": documents})
        answer.raise_for_status()
        assert len(answer.json()) == DOCUMENTS

    async def by_pairs(client: httpx.AsyncClient, seed: int, at_once: int = CLIENTS) -> None:
        query, documents = texts(seed)
        free = asyncio.Semaphore(at_once)

        async def ask(document: str) -> None:
            async with free:
                (await client.post("/predict", json={"inputs": [query, document]})).raise_for_status()

        await asyncio.gather(*map(ask, documents))

    async def measure() -> dict[str, float]:
        ways: tuple[Callable[[httpx.AsyncClient, int], Awaitable[None]], ...]
        ways = in_one, by_pairs, partial(by_pairs, at_once=1)
        found: dict[str, list[float]] = {"one request s": [], "a request a pair s": [], "pairs one by one s": []}
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            await in_one(client, 0)
            for seed in range(1, rounds + 1):  # in turns, each time with texts that were not seen before
                for name, way in zip(found, ways, strict=True):
                    started = time.perf_counter()
                    await way(client, seed)
                    found[name].append(time.perf_counter() - started)
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    return asyncio.run(measure())


def cross_encoder(model: Path, dtype: DtypeName, rounds: int) -> dict[str, float]:
    """Seconds that sentence-transformers takes for the same in process, on all cores; the median."""
    from sentence_transformers import CrossEncoder

    stock = CrossEncoder(str(model), device="cpu", model_kwargs={"dtype": dtype})

    def seconds(seed: int) -> float:
        query, documents = texts(seed)
        pairs: Sequence[tuple[str, str]] = [(query, document) for document in documents]
        started = time.perf_counter()
        stock.predict(pairs, batch_size=32, show_progress_bar=False)
        return time.perf_counter() - started

    seconds(0)
    return {"predict s": statistics.median(map(seconds, range(1, rounds + 1)))}
