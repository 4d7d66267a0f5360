"""A fixed input whose unsharded logits are known, so that a wrong shard is found before the first request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tpray.errors import ParityError
from tpray.runtime.records import INPUT_NAMES, Canary

if TYPE_CHECKING:
    from torch import Tensor

    from tpray.parallel_layers.checkpoint import Checkpoint

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 2e-1}
"""Largest difference from the unsharded float32 logits, as a share of the largest of them (or of 1).

In float32 only the order of additions differs, about 1e-6; bfloat16 rounds each of some 2 x layers sums to
8 bits, about 1e-2; int8 keeps 7 bits below the largest of each token and channel. A rank's missing or doubled
part moves logits by their own size.
"""


def make_canary(checkpoint: Checkpoint, max_length: int) -> Canary:
    """Run the stock transformers model, unsharded and in float32, on seeded input with padding in it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config = checkpoint.config
    inputs = _inputs(config, max_length)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint.directory, dtype=torch.float32, local_files_only=True
    ).eval()
    from tpray.parallel_layers.shard import ShardedClassifier

    with torch.no_grad():
        logits = ShardedClassifier(model)(*inputs)
    ids, mask, types = (tuple(map(tuple, t.tolist())) for t in inputs)
    return Canary(input_ids=ids, attention_mask=mask, token_type_ids=types, logits=tuple(map(tuple, logits.tolist())))


def _inputs(config: object, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, token_type_ids, int64 ``[3, S]``; three rows of different lengths."""
    import torch

    vocabulary: int = config.vocab_size  # type: ignore[attr-defined]  # every text config has it
    length = min(24, max_length)
    generator = torch.Generator().manual_seed(20)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, used in enumerate((length, max(1, length * 3 // 4), min(3, length))):
        mask[row, used:] = 0
    ids[mask == 0] = getattr(config, "pad_token_id", None) or 0
    types = torch.zeros_like(ids)
    types[:, length // 2 :] = 1
    return ids, mask, types * mask


def canary_inputs(canary: Canary) -> list[npt.NDArray[np.int64]]:
    """A program's inputs, int64 ``[B, S]`` each."""
    return [np.array(getattr(canary, name), dtype=np.int64) for name in INPUT_NAMES]


def check_canary(canary: Canary, logits: npt.NDArray[Any], dtype: str) -> float:
    """Compare a group's logits ``[B, L]`` with the unsharded ones; the largest relative difference is returned.

    Raises:
        ParityError: it is larger than the dtype explains, or there is a NaN.
    """
    reference = np.array(canary.logits, dtype=np.float32)
    difference = float(np.abs(logits - reference).max() / max(1.0, float(np.abs(reference).max())))
    if not difference <= TOLERANCE[dtype]:  # also refuses NaN
        raise ParityError(
            f"the sharded {dtype} logits differ from the unsharded model's by {difference:.2e}, more than "
            f"{TOLERANCE[dtype]:.0e}: the group must not serve; trace the model again"
        )
    return difference
