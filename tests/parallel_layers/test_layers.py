"""The layers against torch's own, over every way to cut them; ranks are threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import fill, on_ranks
from tpray.errors import CollectiveError, ConfigError, DegreeError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.collective import ThreadCollective, all_reduce
from tpray.parallel_layers.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    shard_bounds,
)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 3])
def test_column_then_row_equals_two_linears(tp: int, stride: int) -> None:
    """Catches a row bias added on every rank, and a column output cut in another order than the row's input."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(10, 24), nn.Linear(24, 6), torch.randn(2, 5, 10)
    expected = second(torch.tanh(first(x)))

    def work(rank: int) -> Tensor:
        column = ColumnParallelLinear(10, 24, gather_output=False, stride=stride)
        row = RowParallelLinear(24, 6, input_is_parallel=True, stride=stride)
        fill(column, dict(first.named_parameters()))
        fill(row, dict(second.named_parameters()))
        result: Tensor = row(torch.tanh(column(x)))
        return result

    for result in on_ranks(tp, work):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gathered_column_and_scattered_row(tp: int) -> None:
    torch.manual_seed(1)
    first, second, x = nn.Linear(10, 8), nn.Linear(8, 6), torch.randn(3, 10)

    def work(rank: int) -> Tensor:
        column, row = ColumnParallelLinear(10, 8), RowParallelLinear(8, 6)
        assert column.bias is not None
        assert column.bias.shape == (8,)  # whole: it is added after the gather
        fill(column, dict(first.named_parameters()))
        fill(row, dict(second.named_parameters()))
        result: Tensor = row(column(x))
        return result

    for result in on_ranks(tp, work):
        torch.testing.assert_close(result, second(first(x)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("by_width", [False, True])
def test_embedding(tp: int, by_width: bool) -> None:
    torch.manual_seed(2)
    whole, ids = nn.Embedding(16, 8), torch.randint(0, 16, (3, 7))

    def work(rank: int) -> Tensor:
        layer = ParallelEmbedding(16, 8, shard_across_embedding=by_width)
        fill(layer, dict(whole.named_parameters()))
        result: Tensor = layer(ids)
        return result

    for result in on_ranks(tp, work):
        assert torch.equal(result, whole(ids))


def test_bfloat16_is_summed_in_float32() -> None:
    """Four ranks of 1 + 3/256 lose their fractions if each partial sum is rounded to bfloat16."""
    x = torch.full((4,), 257 / 256, dtype=torch.float32).to(torch.bfloat16)
    results = on_ranks(4, lambda rank: all_reduce(x))
    assert all(torch.equal(r, (x.float() * 4).to(torch.bfloat16)) for r in results)


@pytest.mark.parametrize("tp", [3, 4])
def test_padding_makes_any_degree_divide(tp: int) -> None:
    """Zeros are added to the shares; they neither reach a gathered output nor a sum."""
    torch.manual_seed(3)
    first, second, x = nn.Linear(10, 7), nn.Linear(7, 6), torch.randn(3, 10)

    def gathered(rank: int) -> Tensor:
        column, row = ColumnParallelLinear(10, 7, pad=True), RowParallelLinear(7, 6, pad=True)
        fill(column, dict(first.named_parameters()))
        fill(row, dict(second.named_parameters()))
        result: Tensor = row(torch.cos(column(x)))
        return result

    def parallel(rank: int) -> Tensor:
        column = ColumnParallelLinear(10, 7, pad=True, gather_output=False)
        row = RowParallelLinear(7, 6, pad=True, input_is_parallel=True)
        fill(column, dict(first.named_parameters()))
        fill(row, dict(second.named_parameters()))
        assert column.weight.shape[0] == row.weight.shape[1] == -(-7 // tp)
        result: Tensor = row(torch.cos(column(x)))
        return result

    for work in (gathered, parallel):
        for result in on_ranks(tp, work):
            torch.testing.assert_close(result, second(torch.cos(first(x))), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dimension", [0, 1])
def test_sequence_parallel(dimension: int) -> None:
    """Each rank gives and takes its part of the sequence; between the two layers every rank has all of it."""
    torch.manual_seed(4)
    first, second, x = nn.Linear(10, 8), nn.Linear(8, 10), torch.randn(4, 6, 10)
    expected = second(torch.tanh(first(x)))

    def work(rank: int) -> Tensor:
        column = ColumnParallelLinear(
            10, 8, gather_output=False, sequence_parallel_enabled=True, sequence_dimension=dimension
        )
        row = RowParallelLinear(
            8, 10, input_is_parallel=True, sequence_parallel_enabled=True, sequence_dimension=dimension
        )
        fill(column, dict(first.named_parameters()))
        fill(row, dict(second.named_parameters()))
        result: Tensor = row(torch.tanh(column(x.chunk(2, dimension)[rank])))
        return result

    results = on_ranks(2, work)
    torch.testing.assert_close(torch.cat(results, dimension), expected, atol=1e-5, rtol=0)


def test_the_sum_travels_in_the_dtype_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = []

    def record(y: Tensor) -> Tensor:
        carried.append(y.dtype)
        return y

    monkeypatch.setattr("tpray.parallel_layers.collective.all_reduce", record)
    with parallel_state.use(0, 2):
        for dtype in (torch.float64, torch.float32):
            row = RowParallelLinear(4, 4, dtype=torch.bfloat16, reduce_dtype=dtype)
            assert row(torch.ones(1, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert carried == [torch.float64, torch.bfloat16], "bfloat16 is summed in float32 in any case"


def test_strides_deal_out_each_fused_part() -> None:
    assert shard_bounds(12, 1, 2, 3) == ((2, 4), (6, 8), (10, 12))


def test_combinations_that_mean_nothing_are_refused() -> None:
    with parallel_state.use(0, 4):
        with pytest.raises(ConfigError, match="stride"):
            ColumnParallelLinear(4, 10, stride=2, pad=True)
        with pytest.raises(ConfigError, match="input_is_parallel"):
            RowParallelLinear(4, 4, sequence_parallel_enabled=True)
        with pytest.raises(ConfigError, match="gather"):
            ColumnParallelLinear(4, 4, bounds=[(0, 1)])


def test_indivisible_sizes_are_refused() -> None:
    with parallel_state.use(0, 4), pytest.raises(DegreeError, match="10 does not divide into 4"):
        ColumnParallelLinear(4, 10)


def test_no_state_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="not initialised"):
        ColumnParallelLinear(4, 4)


def test_a_collective_without_peers_is_refused() -> None:
    with parallel_state.use(0, 2), pytest.raises(CollectiveError, match="all_reduce"):
        all_reduce(torch.ones(2))


def test_a_missing_rank_is_an_error_and_no_hang() -> None:
    members = ThreadCollective.create(2, timeout_s=0.2)
    with pytest.raises(CollectiveError, match="another rank"):
        members[0].all_reduce(torch.ones(1))
