"""What a rank takes of memory, measured on a model whose weights outweigh what else is in the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.memory import checkpoint, measure

KEPT = 1.15
"""Of a rank's weights, the most that it may keep while it serves, besides what it takes without any."""


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dtype"), [(1, "float32"), (2, "float32"), (1, "bfloat16")])
def test_a_rank_keeps_its_weights_once(tp: int, dtype: str, tmp_path: Path) -> None:
    """110 MB in float32. What is freed must be given back too, and what was prepacked not kept as it was."""
    model, empty = checkpoint(tmp_path, 3, words=8000), checkpoint(tmp_path, 1, hidden=128, words=200)
    large, small = measure(model, tmp_path, tp, dtype), measure(empty, tmp_path, tp, dtype)
    for start, ranks in large.items():
        for own, none in zip(ranks, small[start], strict=True):
            assert own.kept - none.kept <= KEPT * own.shard + (8 << 20), (start, own, none)
