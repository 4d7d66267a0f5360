"""What a rank takes of memory, measured on a model whose weights outweigh what else is in the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.memory import checkpoint, measure

SHARE = 1.15
"""Of a rank's weights, the most that it may take, files that are mapped included, besides what it takes without any."""
TRACING = 1.4
"""The same of its own memory while it traces, which changes the dtype and merges layers."""
SLACK = 12 << 20
"""What differs from run to run."""


@pytest.mark.nightly
@pytest.mark.parametrize(("tp", "dtype"), [(1, "float32"), (2, "float32"), (1, "bfloat16")])
def test_a_rank_keeps_its_weights_once(tp: int, dtype: str, tmp_path: Path) -> None:
    """110 MB in float32. What is freed must be given back too, and what was prepacked not kept as it was."""
    model, empty = checkpoint(tmp_path, 3, words=8000), checkpoint(tmp_path, 1, hidden=128, words=200)
    large, small = measure(model, tmp_path, tp, dtype), measure(empty, tmp_path, tp, dtype)
    for start, ranks in large.items():
        for own, none in zip(ranks, small[start], strict=True):
            found = start, own, none
            assert own.kept - none.kept <= SHARE * own.shard + SLACK, found
            assert own.own_peak - none.own_peak <= (TRACING if start == "first" else SHARE) * own.shard + SLACK, found
            if start == "second":
                assert own.peak - none.peak <= SHARE * own.shard + SLACK, found
