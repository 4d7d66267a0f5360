"""Which dialect words what is said of a path, where no engine is asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, cast

from starlette.routing import BaseRoute, Match

from tpray.serving.dialects import DIALECTS
from tpray.serving.dialects.base import Answering, Dialect


class _Nobody:
    """Stands for what answers: its routes are looked at, and it is never asked."""

    accepts = ()

    def __getattr__(self, name: str) -> _Nobody:
        return self

    def __call__(self, *_: Any) -> _Nobody:
        return self


@cache
def _spoken() -> list[tuple[Dialect, list[BaseRoute]]]:
    """The routes of each dialect."""
    nobody, found = cast(Answering, _Nobody()), []
    for dialect in DIALECTS:
        pages = [] if dialect.pages is None else dialect.pages(nobody).routes
        found.append((dialect, [*dialect.routes(dialect.handlers(nobody)).routes, *pages]))
    return found


def dialect_of(path: str, below: str = "") -> Dialect:
    """The dialect whose route a path is, with whatever method; the first where it is nobody's.

    Args:
        below: what a name follows that may have slashes, and after it another path: ``/models/`` in
            ``/models/NAME/predict``.
    """
    return next(_dialects(path, below, (Match.FULL, Match.PARTIAL)), DIALECTS[0])


def classifying(path: str, below: str = "") -> Dialect | None:
    """The dialect in which a ``POST`` to a path would be answered; None: there is none. below: as for `dialect_of`."""
    return next(_dialects(path, below, (Match.FULL,)), None)


def _dialects(path: str, below: str, matches: Collection[Match]) -> Iterator[Dialect]:
    tried = _ends(path, below) if below and path.startswith(below) else iter((path,))
    for each in tried:
        scope = {"type": "http", "method": "POST", "path": each, "root_path": "", "headers": []}
        for dialect, routes in _spoken():
            if any(route.matches(scope)[0] in matches for route in routes):
                yield dialect


def _ends(path: str, below: str) -> Iterator[str]:
    """What may follow the name, the longest first, and last the path itself."""
    rest = path[len(below) :]
    yield from (rest[at:] for at in range(1, len(rest) - 1) if rest[at] == "/")
    yield path
