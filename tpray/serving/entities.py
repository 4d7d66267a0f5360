"""Tokens and their scores to entities, as transformers' token-classification pipeline makes them.

Legend: T tokens of a text without special ones, L labels.

Source: transformers/pipelines/token_classification.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tpray.group.wire import Array
from tpray.serving.scores import softmax
from tpray.serving.token_codec import Token

Strategy = Literal["none", "simple", "first", "average", "max"]
"""Which tokens are one entity, and whose score it has.

none: each token by itself. simple: neighbours of one label. first, average, max: the same of words, which have the
label and the score of their first token, of the mean over their tokens, or of their surest token.
"""
OF_WORDS: tuple[Strategy, ...] = ("first", "average", "max")
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, slots=True)
class _Labelled:
    """What has one label: a token, or a word."""

    label: str
    score: float
    word: str
    start: int | None
    end: int | None


def entities(
    tokens: Sequence[Token], logits: Array, labels: Sequence[str], strategy: Strategy, join: Callable[[list[str]], str]
) -> list[dict[str, Any]]:
    """The entities of one text, with the keys that transformers gives them.

    Args:
        logits: float32 ``[T, L]``.
        join: makes a text of words as the vocabulary has them.
    """
    if not tokens:
        return []
    scores = softmax(logits.astype(np.float64))
    if strategy in OF_WORDS:
        return _grouped([_word(*each, labels, strategy, join) for each in _words(tokens, scores)], join)
    best = scores.argmax(axis=1)
    found = [
        _Labelled(labels[label], float(own[label]), token.word, token.start, token.end)
        for token, own, label in zip(tokens, scores, best.tolist(), strict=True)
    ]
    if strategy == "simple":
        return _grouped(found, join)
    return [
        {"entity": e.label, "score": e.score, "index": t.index, "word": e.word, "start": e.start, "end": e.end}
        for e, t in zip(found, tokens, strict=True)
    ]


def _words(tokens: Sequence[Token], scores: Array) -> list[tuple[Sequence[Token], Array]]:
    """The tokens of each word, and their scores."""
    starts = [i for i, token in enumerate(tokens) if i == 0 or not token.goes_on]
    ends = [*starts[1:], len(tokens)]
    return [(tokens[start:end], scores[start:end]) for start, end in zip(starts, ends, strict=True)]


def _word(
    tokens: Sequence[Token], scores: Array, labels: Sequence[str], strategy: Strategy, join: Callable[[list[str]], str]
) -> _Labelled:
    if strategy == "first":
        own = scores[0]
    elif strategy == "average":
        own = scores.mean(axis=0)
    else:
        own = scores[scores.max(axis=1).argmax()]
    label = int(own.argmax())
    word = join([token.word for token in tokens])
    return _Labelled(labels[label], float(own[label]), word, tokens[0].start, tokens[-1].end)


def _grouped(found: Sequence[_Labelled], join: Callable[[list[str]], str]) -> list[dict[str, Any]]:
    """Neighbours of one tag together: B-TAG begins an entity, I-TAG or TAG goes on with one."""
    groups: list[list[_Labelled]] = []
    for each in found:
        if groups and not each.label.startswith("B-") and _tag(each.label) == _tag(groups[-1][-1].label):
            groups[-1].append(each)
        else:
            groups.append([each])
    return [
        {
            "entity_group": group[0].label.split("-", 1)[-1],
            "score": sum(each.score for each in group) / len(group),
            "word": join([each.word for each in group]),
            "start": group[0].start,
            "end": group[-1].end,
        }
        for group in groups
    ]


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
