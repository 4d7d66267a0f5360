"""After the group: logits to scores with the names of their labels.

Legend: B rows, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.group.wire import Array


@dataclass(frozen=True, slots=True)
class Score:
    """One label of one item. score: a probability, or the raw logit where that was asked for."""

    label: str
    score: float


def labelled(logits: Array, record: ModelRecord, raw: bool = False) -> list[list[Score]]:
    """Every label of each item, best first; see `activated`."""
    return ranked(activated(logits, record, raw), record)


def activated(logits: Array, record: ModelRecord, raw: bool = False) -> Array:
    """Scores, float64 ``[B, L]``.

    Args:
        logits: float32 ``[B, L]``, finite.
        raw: give the logits themselves.

    The activation follows transformers' text-classification pipeline: sigmoid for multi-label models
    and for a single label, softmax for one of several, none for regression.
    """
    values = logits.astype(np.float64)
    if raw or record.problem_type == "regression":
        return values
    alone = record.problem_type == "multi_label_classification" or values.shape[1] == 1
    return sigmoid(values) if alone else softmax(values)


def ranked(values: Array, record: ModelRecord) -> list[list[Score]]:
    """The labels with their scores ``[B, L]``, each item's best first."""
    order = np.argsort(-values, axis=1, kind="stable")
    best_first, labels = np.take_along_axis(values, order, axis=1).tolist(), record.labels
    return [
        [Score(labels[i], score) for i, score in zip(row, scores, strict=True)]
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
