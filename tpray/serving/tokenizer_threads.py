"""The threads on which much text is tokenised, so that the event loop goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tpray.chat import Chat
from tpray.errors import DeadlineError
from tpray.serving.codec import LARGE_CHARS
from tpray.tokenizer import Item, Tokens

T = TypeVar("T")

INLINE_CHARS = 2048
"""Longer input is tokenised on a thread, and all of it by a tokenizer that is not compiled: it would hold up the event
loop for more than about a millisecond."""

TOKENIZER_THREADS = 2
"""How many requests are tokenised on threads at once. The others wait their turn, within their deadlines."""


class TokenizerThreads:
    """Those of one engine. Large texts have one of their own, so that they wait for one another and nobody else."""

    def __init__(self) -> None:
        self.usual = ThreadPoolExecutor(TOKENIZER_THREADS, "tpray-tokenizer")
        self._large = ThreadPoolExecutor(1, "tpray-large")

    async def run(self, encode: Callable[[float], T], characters: int, deadline: float) -> T:
        """What ``encode`` makes of so many characters; it stops at ``deadline`` or one part of a text later.

        Raises:
            DeadlineError: it passed.
        """
        loop = asyncio.get_running_loop()
        threads = self._large if characters > LARGE_CHARS else self.usual
        try:
            return await asyncio.wait_for(
                loop.run_in_executor(threads, encode, deadline), max(0.0, deadline - time.monotonic())
            )
        except TimeoutError as e:
            raise DeadlineError("the request's time ran out before its text was tokenised: send less text") from e

    def close(self) -> None:
        """Take no more; what is under way ends by itself."""
        self.usual.shutdown(wait=False)
        self._large.shutdown(wait=False)


def characters_in(item: Item) -> int:
    """Of all its texts."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, Tokens):
        return 0
    return item.characters if isinstance(item, Chat) else len(item[0]) + len(item[1])
