"""What several test modules need."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def rows(lengths: list[int], pad_id: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    shape = len(lengths), max(lengths)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    types = np.zeros(shape, dtype=np.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = rng.integers(5, 120, length)
        mask[i, :length] = 1
        types[i, length // 2 : length] = 1
    return [ids, mask, types]


def pad_id_of(directory: Path) -> int:
    found: int = json.loads((directory / "config.json").read_text()).get("pad_token_id") or 0
    return found
