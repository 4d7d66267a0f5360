"""Scores of pairs in their own order: one query with each document, or each query with its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpray.errors import EmptyInputError, InputError, InputTooLongError, ItemError, PayloadTooLargeError
from tpray.serving.answers import Ranking
from tpray.serving.engine import Engine

OF_A_QUERY = (EmptyInputError, InputError, InputTooLongError)
"""What is wrong with a query by itself is one of these, without a number."""


@dataclass(frozen=True)
class Scored:
    """The score of each pair, and how many tokens they have together."""

    scores: list[float]
    tokens: int


async def score_pairs(engine: Engine, queries: Sequence[str], documents: Sequence[str], **how: Any) -> Scored:
    """Score pairs as `Engine.rerank` does.

    Args:
        queries: one, or as many as there are documents. how: arguments of `Engine.rerank`.

    Raises:
        InputError: there are neither one nor as many. As `Engine.rerank`; the number of an error is its pair's.
    """
    if not queries or not documents:
        raise EmptyInputError(f"there are no {'documents' if queries else 'queries'} to score: send at least one")
    if len(queries) not in (1, len(documents)):
        raise InputError(
            f"there are {len(queries)} queries and {len(documents)} documents: send one query, or one for each document"
        )
    most = engine.config.max_concurrent_requests
    if len(documents) > most:
        raise PayloadTooLargeError(
            f"there are {len(documents)} pairs and the limit is {most} (--max-concurrent-requests): send fewer"
        )
    numbers: dict[str, list[int]] = {}
    for number, query in enumerate(queries if len(queries) > 1 else list(queries) * len(documents)):
        numbers.setdefault(query, []).append(number)

    async def of_one(query: str, own: list[int]) -> Ranking:
        try:
            return await engine.rerank(query, [documents[number] for number in own], **how)
        except ItemError as e:
            if e.item is not None:
                raise type(e)(e.message, own[e.item]) from e
            if len(queries) > 1 and type(e) in OF_A_QUERY:
                raise type(e)(f"pair {own[0]}: {e.message}") from e
            raise

    asked = [asyncio.ensure_future(of_one(*each)) for each in numbers.items()]
    try:
        rankings = await asyncio.gather(*asked)
    finally:
        for task in asked:  # where one fails, or the client leaves, the others are of no use
            task.cancel()
    scores = [math.nan] * len(documents)
    for own, ranking in zip(numbers.values(), rankings, strict=True):
        for each in ranking.documents:
            scores[own[each.index]] = each.score
    return Scored(scores, sum(ranking.tokens for ranking in rankings))
