"""Any number of items through an engine that takes some at a time: a few parts are under way at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from tpray.errors import GroupError, ItemError
from tpray.serving.answers import Answer, Tagged

T = TypeVar("T")
Asked = TypeVar("Asked")


def in_parts(
    items: Iterable[Asked], submit: Callable[[list[Asked]], Future[Answer | Tagged]], size: int, ahead: int
) -> Iterator[list[dict[str, Any]] | ItemError]:
    """The answer of each item, or its error, in order.

    Args:
        submit: asks the engine.
        size: items of a part.
        ahead: parts that are under way while one is waited for.
    """
    under_way: list[tuple[list[Asked], Future[Answer | Tagged]]] = []
    part: list[Asked] = []

    def send() -> None:
        own = list(part)
        under_way.append((own, submit(own)))
        part.clear()

    def rows(own: list[Asked], future: Future[Answer | Tagged]) -> Iterator[list[dict[str, Any]] | ItemError]:
        try:
            answer = wait_for(future)
        except ItemError as e:
            if len(own) == 1:
                yield e
                return
            for item in own:  # which of them are at fault shows one by one
                yield from rows([item], submit([item]))
            return
        yield from answer.rendered()

    for item in items:
        part.append(item)
        if len(part) == size:
            send()
        if len(under_way) > ahead:
            yield from rows(*under_way.pop(0))
    if part:
        send()
    for own, future in under_way:
        yield from rows(own, future)


def raised(answers: Iterable[list[dict[str, Any]] | ItemError]) -> Iterator[list[dict[str, Any]]]:
    """The answers, until one is an error."""
    for number, answer in enumerate(answers):
        if isinstance(answer, ItemError):
            raise type(answer)(answer.message, None if answer.item is None else number)
        yield answer


class Room:
    """So many items under way at once, whoever sends them: the others wait, and who came first goes first."""

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._turn, self._left = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, items: int) -> AsyncIterator[None]:
        """Room for ``items``; for all that there is, if they are more."""
        items = min(items, self._most)
        async with self._turn:
            while self._free < items:
                self._left.clear()
                await self._left.wait()
            self._free -= items
        try:
            yield
        finally:
            self._free += items
            self._left.set()


def wait_for(future: Future[T]) -> T:
    """What the classifier's loop has made of it."""
    try:
        return future.result()
    except CancelledError as e:  # what was under way when the loop was stopped
        raise GroupError("this classifier was closed meanwhile") from e
