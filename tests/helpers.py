"""What several test modules need."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def rows(lengths: list[int], pad_id: int, end_id: int | None = None) -> list[np.ndarray]:
    """Ids, mask and types of rows of these lengths; end_id: each row's last token."""
    rng = np.random.default_rng(3)
    shape = len(lengths), max(lengths)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    types = np.zeros(shape, dtype=np.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = rng.integers(5, 120, length)
        if end_id is not None:
            ids[i, length - 1] = end_id
        mask[i, :length] = 1
        types[i, length // 2 : length] = 1
    return [ids, mask, types]


def pad_id_of(directory: Path) -> int:
    found: int = json.loads((directory / "config.json").read_text()).get("pad_token_id") or 0
    return found


def end_id_of(directory: Path) -> int | None:
    """The end of sequence that a classifier reads, if it is an encoder-decoder's."""
    config = json.loads((directory / "config.json").read_text())
    return config["eos_token_id"] if config.get("is_encoder_decoder") else None
