"""What the engine answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpray.serving.scores import Ranked, Score


@dataclass(frozen=True)
class Timing:
    """How many tokens a request had, and where its time went."""

    tokens: int
    tokenize_s: float
    queue_s: float
    compute_s: float
    total_s: float


@dataclass(frozen=True)
class Answer(Timing):
    """What became of one request: of each item the scores that were asked for."""

    scores: list[list[Score]]

    def rendered(self) -> list[list[dict[str, Any]]]:
        """For Python: of each item its labels and their scores."""
        return [[{"label": each.label, "score": each.score} for each in scores] for scores in self.scores]


@dataclass(frozen=True)
class Tagged(Timing):
    """The entities of each text; see `tpray.serving.entities`."""

    entities: list[list[dict[str, Any]]]

    def rendered(self) -> list[list[dict[str, Any]]]:
        """For Python: as they are."""
        return self.entities


@dataclass(frozen=True)
class Ranking(Timing):
    """Documents by their relevance, the best first; of equal ones that which was sent first."""

    documents: list[Ranked]


def rendered(ranked: Sequence[Ranked], documents: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """For Python; with those of ``documents`` that are named, if these are given."""
    return [
        {"index": each.index, "score": each.score} | ({} if documents is None else {"document": documents[each.index]})
        for each in ranked
    ]
