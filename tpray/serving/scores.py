"""After the group: logits to scores with the names of their labels.

Legend: B rows, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.errors import InputError
from tpray.group.wire import Array

Activation = Literal["softmax", "sigmoid", "none"]
"""What makes scores of logits. none: the scores are the logits."""
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True, slots=True)
class Score:
    """One label of one item. score: a probability, or the raw logit where that was asked for. index: the label's."""

    label: str
    score: float
    index: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document: its number in the request, and how relevant it is; see `Relevance.scores`."""

    index: int
    score: float


Scored = TypeVar("Scored", Score, Ranked)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a request wants to know of each item's labels, or of its documents.

    activation: None: the checkpoint's own. top_k: only so many, the best; None: all.

    Raises:
        InputError: there is no such activation, or ``top_k`` is less than 1.
    """

    activation: Activation | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise InputError(f"the activation is {self.activation!r}: there are {', '.join(ACTIVATIONS)}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"the best {self.top_k} are asked for: ask for 1 or more")

    @classmethod
    def of(cls, raw_scores: bool, activation: Activation | None = None, top_k: int | None = None) -> Scoring:
        """What Python code asks for.

        Raises:
            InputError: ``raw_scores`` and another activation than ``none``, or as `Scoring`.
        """
        if raw_scores and activation not in (None, "none"):
            raise InputError(f"raw_scores are logits, and activation is {activation!r}: ask for one of them")
        return cls("none" if raw_scores else activation, top_k)

    def chosen(self, best_first: Sequence[Scored]) -> list[Scored]:
        """Those that are asked for."""
        return list(best_first[: self.top_k])


OWN, RAW = Scoring(), Scoring("none")
"""Of every label the checkpoint's own score, or its logit."""


def own_activation(record: ModelRecord) -> Activation:
    """The checkpoint's, as transformers' text-classification pipeline has it.

    Sigmoid for multi-label models and for a single label, softmax for one of several, none for regression.
    """
    if record.problem_type == "regression":
        return "none"
    alone = record.problem_type == "multi_label_classification" or len(record.labels) == 1
    return "sigmoid" if alone else "softmax"


def labelled(logits: Array, record: ModelRecord, activation: Activation | None = None) -> list[list[Score]]:
    """Every label of each item, best first; see `activated`."""
    return ranked(activated(logits, record, activation), record)


def activated(logits: Array, record: ModelRecord, activation: Activation | None = None) -> Array:
    """Scores, float64 ``[B, L]``.

    Args:
        logits: float32 ``[B, L]``, finite.
        activation: None: `own_activation`.
    """
    values = logits.astype(np.float64)
    how = activation or own_activation(record)
    if how == "none":
        return values
    return sigmoid(values) if how == "sigmoid" else softmax(values)


def ranked(values: Array, record: ModelRecord) -> list[list[Score]]:
    """The labels with their scores ``[B, L]``, each item's best first."""
    order = np.argsort(-values, axis=1, kind="stable")
    best_first, labels = np.take_along_axis(values, order, axis=1).tolist(), record.labels
    return [
        [Score(labels[i], score, i) for i, score in zip(row, scores, strict=True)]
        for row, scores in zip(order.tolist(), best_first, strict=True)
    ]


def sigmoid(values: Array) -> Array:
    """Element by element."""
    small = np.exp(-np.abs(values))  # exp of a negative number only, so that no logit overflows
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def softmax(values: Array) -> Array:
    """Of each row."""
    exponents = np.exp(values - values.max(axis=1, keepdims=True))
    result: Array = exponents / exponents.sum(axis=1, keepdims=True)
    return result
