"""What a classifier makes of sentence pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Pair


def encode(tokenizer: Any, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """``pairs`` as the model's padded inputs, int64 tensors [pairs, positions]."""
    firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]
    encoded = tokenizer(firsts, seconds, padding=True, truncation=True, return_tensors="pt")
    return dict(encoded)


@torch.inference_mode()
def probabilities(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Tensor:
    """The probability of each class [pairs, 2]."""
    parts = [
        model(**encode(tokenizer, pairs[start : start + 100])).logits.softmax(dim=-1)
        for start in range(0, len(pairs), 100)
    ]
    return torch.cat(parts)


def accuracies(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> dict[str, float]:
    """The share of right answers over all ``pairs`` and for each kind of pair."""
    right = probabilities(model, tokenizer, pairs).argmax(dim=-1) == torch.tensor([pair.label for pair in pairs])
    groups: dict[str, list[int]] = defaultdict(list)
    for pair, correct in zip(pairs, right.tolist(), strict=True):
        groups["all"].append(correct)
        groups[pair.kind].append(correct)
    return {kind: round(sum(results) / len(results), 4) for kind, results in groups.items()}
