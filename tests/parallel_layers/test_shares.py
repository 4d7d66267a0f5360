"""Shares that do not add up to the whole are refused, and no token or feature is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import filled, on_ranks
from tpray.errors import ConfigError, DegreeError
from tpray.parallel_layers.layers import (
    ColumnParallelLinear,
    InputChannelParallelConv2d,
    ParallelEmbedding,
    RowParallelLinear,
)
from tpray.parallel_layers.preshard import get_sharded_checkpoint

SAME: Any = "same"


@pytest.mark.parametrize(
    "forward",
    [
        lambda: RowParallelLinear(
            4, 3, input_is_parallel=True, sequence_parallel_enabled=True, sequence_dimension=1
        )(torch.ones(1, 5, 2)),
        lambda: ParallelEmbedding(4, 3, sequence_parallel_enabled=True)(torch.zeros(1, 5, dtype=torch.int64)),
    ],
)  # fmt: skip
def test_a_sequence_that_the_ranks_cannot_share_is_refused(forward: Callable[[], Tensor]) -> None:
    with pytest.raises(DegreeError, match="a dimension of 5 does not divide into 2 ranks"):
        on_ranks(2, lambda rank: forward())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ColumnParallelLinear(4, 12, stride=3), "stride needs gather_output=False"),
        (lambda: ParallelEmbedding(4, 2, use_spmd_rank=True, rank_ordering=[1, 0]), "leave rank_ordering and bounds"),
        (lambda: InputChannelParallelConv2d(4, 4, 3, padding=SAME), "takes its padding as numbers, not as 'same'"),
    ],
)  # fmt: skip
def test_arguments_that_would_give_another_answer_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        on_ranks(2, lambda rank: make())


@pytest.mark.parametrize("tp", [1, 2])
def test_a_sequence_parallel_embedding_has_the_sequence_first_at_every_degree(tp: int) -> None:
    torch.manual_seed(0)
    whole, ids = nn.Embedding(8, 3), torch.randint(0, 8, (2, 4))
    parts = on_ranks(tp, lambda rank: filled(ParallelEmbedding(8, 3, sequence_parallel_enabled=True), whole)(ids))
    torch.testing.assert_close(torch.cat(parts), whole(ids).transpose(0, 1))


def test_tied_weights_are_cut_under_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = ColumnParallelLinear(4, 8, bias=False, gather_output=False)
            self.again = ColumnParallelLinear(4, 8, bias=False, gather_output=False)
            self.again.weight = self.out.weight

    whole = torch.randn(8, 4)

    def load(rank: int) -> Tensor:
        model, checkpoint = Tied(), {"out.weight": whole, "again.weight": whole}
        get_sharded_checkpoint(checkpoint, model, rank, 2)
        model.load_state_dict(checkpoint)
        return model.again.weight

    torch.testing.assert_close(torch.cat(on_ranks(2, load)), whole)
