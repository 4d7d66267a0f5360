"""What Python callers get, as types: of a server's handle and of `tpray.load`'s classifier alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class LabelScore(TypedDict):
    """One label of an item. score: a probability, or the logit where that was asked for."""

    label: str
    score: float


class _Ranked(TypedDict):
    index: int
    score: float


class RankedDocument(_Ranked, total=False):
    """A document: its number in the request, and how relevant it is; its text where that was asked for."""

    document: str


class _Found(TypedDict):
    score: float
    word: str
    start: int | None
    end: int | None


class Entity(_Found, total=False):
    """A token with ``entity`` and ``index``, or several with ``entity_group``; see `tpray.serving.entities`."""

    entity: str
    entity_group: str
    index: int
    logits: list[float]


Pair = tuple[str, str]
Texts = Sequence[str | Pair]
"""A batch of texts and pairs. (A text is a sequence of texts too; but overloads for one item come first.)"""


def in_order(ranking: list[RankedDocument]) -> list[float]:
    """The scores of a ranking of all documents, in the order in which these were sent."""
    return [each["score"] for each in sorted(ranking, key=lambda each: each["index"])]
