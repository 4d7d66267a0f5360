"""Work that groups do, item by item, as a dataset of Ray Data's: it starts the groups, and what is lost again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray

from tpray import errors
from tpray.data.host import Hosted, from_here

Work = Callable[..., Any]
"""Of a `LocalClassifier`, an item and a `Telling`; what it returns is JSON."""


class Board:
    """How far each item is; a Ray actor that the workers tell, and that outlives them."""

    def __init__(self) -> None:
        self._begun = set[str]()
        self._said: dict[str, tuple[int, float]] = {}

    def begin(self, item: str) -> bool:
        """Whether the item was begun before, by a worker that is no more."""
        before = item in self._begun
        self._begun.add(item)
        return before

    def say(self, item: str, count: int, share: float) -> None:
        """So many records of the item are done, and so much of it, from 0 to 1."""
        self._said[item] = (count, share)

    def said(self) -> dict[str, tuple[int, float]]:
        """What was said of each item at last."""
        return self._said


class Telling:
    """What the work on an item tells of it."""

    def __init__(self, board: Any, item: str) -> None:
        self._board, self._item = board, item

    def begin(self) -> bool:
        """See `Board.begin`."""
        before: bool = ray.get(self._board.begin.remote(self._item))
        return before

    def say(self, count: int, share: float) -> None:
        """See `Board.say`."""
        self._board.say.remote(self._item, count, share)


class _Worker:
    """Ray Data's actor: it has a group, and gives it one item after another."""

    def __init__(self, options: Mapping[str, Any], work: Work, board: Any) -> None:
        self._options, self._work, self._board = options, work, board
        self._group: Hosted | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, with what has become of its item: what the work returned, or a `TprayError`, as JSON."""
        try:
            if self._group is None:
                self._group = Hosted(self._options)
            outcome = {"made": self._group.run(self._work, row["item"], Telling(self._board, row["item"]))}
        except errors.TprayError as e:
            outcome = {"kind": type(e).__name__, "error": str(e)}
        return row | {"outcome": json.dumps(outcome)}


def start_board() -> Any:
    """The handle of a new `Board`."""
    return ray.remote(Board).options(num_cpus=0).remote()


def said(board: Any) -> dict[str, tuple[int, float]]:
    """See `Board.said`."""
    found: dict[str, tuple[int, float]] = ray.get(board.said.remote())
    return found


def each(
    items: Sequence[str], work: Work, options: Mapping[str, Any], replicas: int, board: Any
) -> Iterator[tuple[str, Any]]:
    """Each item and what ``work`` has returned for it, as they are done.

    An item whose worker has ended is begun again; ``work`` must be able to go on with what is left of it.

    Args:
        options: of `tpray.load`, settled.
        replicas: how many groups work side by side.

    Raises:
        TprayError: a group cannot start, or be brought back, or ``work`` has raised.
    """
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with DataContext.current(context):
        rows = [{"item": item} for item in items]
        worker: Any = _Worker  # a class, which Ray Data makes an actor of
        dataset = from_items(rows, override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_args=(from_here(options), work, board),
            num_cpus=0,  # its group has a placement group
            # An item waits for whichever group is free, and not for one of them.
            compute=ActorPoolStrategy(size=replicas, max_tasks_in_flight_per_actor=1),
        )
        for row in dataset.iter_rows():
            outcome = json.loads(row["outcome"])
            if "error" in outcome:
                raise errors.named(outcome["kind"], outcome["error"])
            yield row["item"], outcome["made"]
