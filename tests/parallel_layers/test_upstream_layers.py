"""What neuronx-distributed's layers have beyond the three, against torch's own layers; ranks are threads.

Sizes are odd, biases are not zero.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import filled, on_ranks
from tpray.errors import ConfigError, DegreeError
from tpray.modules.qkv_linear import GQAQKVColumnParallelLinear
from tpray.parallel_layers import layers, mappings, parallel_state
from tpray.parallel_layers.base import create_local_weight, linear_with_async_allreduce
from tpray.parallel_layers.collective import all_reduce
from tpray.parallel_layers.layers import (
    ColumnParallelLinear,
    InputChannelParallelConv2d,
    OutputChannelParallelConv2d,
    ParallelEmbedding,
    RowParallelLinear,
    SPMDRank,
    partition_of,
)
from tpray.parallel_layers.pad import generate_padding_mask, get_number_of_extra_heads, pad_model

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
def test_padded_outputs_may_be_kept(bias: bool) -> None:
    """As upstream for a vocabulary's logits: what pads them is never the largest."""
    whole, x = nn.Linear(5, 7, bias=bias), torch.randn(3, 5)

    def work(rank: int) -> Tensor:
        options: dict[str, Any] = {"pad": True, "pad_alignment_size_per_rank": 4, "keep_padded_output": True}
        layer = filled(ColumnParallelLinear(5, 7, bias, **options), whole)
        assert layer.output_size == 8
        assert layer.output_size_per_partition == 4
        y: Tensor = layer(x)
        return y

    for y in on_ranks(2, work):
        close(y[:, :7], whole(x))
        assert (y[:, 7] == (torch.finfo(torch.float32).min if bias else 0)).all()


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 1, 2]])
def test_parts_in_another_order_make_up_the_same_whole(order: list[int]) -> None:
    first, second, x = nn.Linear(5, 9), nn.Linear(9, 4), torch.randn(2, 5)
    words, ids = nn.Embedding(6, 5), torch.randint(0, 6, (2, 3))

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        column = filled(ColumnParallelLinear(5, 9, gather_output=False, rank_ordering=order), first)
        close(column.weight, first.weight[3 * order[rank] :][:3])
        parallel = filled(RowParallelLinear(9, 4, input_is_parallel=True, rank_ordering=order), second)
        scattered = filled(RowParallelLinear(9, 4, rank_ordering=order), second)
        embedding = filled(ParallelEmbedding(6, 5, rank_ordering=order), words)
        return parallel(column(x)), scattered(first(x)), embedding(ids)

    for results in on_ranks(3, work):
        for found, expected in zip(results, (second(first(x)), second(first(x)), words(ids)), strict=True):
            close(found, expected)


def test_an_order_that_lacks_a_rank_and_an_order_for_gathered_parts_are_refused() -> None:
    with parallel_state.use(0, 2):
        with pytest.raises(ConfigError, match="each of the ranks 0 to 1"):
            RowParallelLinear(4, 4, rank_ordering=[0, 0])
        with pytest.raises(ConfigError, match="gather_output=False"):
            ColumnParallelLinear(4, 4, rank_ordering=[1, 0])
        with pytest.raises(ConfigError, match="rank_ordering"):
            ParallelEmbedding(4, 4, shard_across_embedding=True, rank_ordering=[1, 0])


def test_slices_of_a_weight() -> None:
    first, second, x, rows = nn.Linear(5, 8), nn.Linear(8, 3), torch.randn(2, 5), torch.tensor([3, 0])

    def work(rank: int) -> Tensor:
        column = filled(ColumnParallelLinear(5, 8, bias=False, gather_output=False), first)
        row = filled(RowParallelLinear(8, 3, input_is_parallel=True), second)
        y: Tensor = row(column(x, rows), rows)
        return y

    kept = torch.tensor([3, 0, 7, 4])
    for y in on_ranks(2, work):
        close(y, (x @ first.weight.T)[:, kept] @ second.weight[:, kept].T + second.bias)


def test_skipped_biases_and_sums_are_the_callers() -> None:
    whole, x = nn.Linear(6, 5), torch.randn(2, 6)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        row = filled(RowParallelLinear(6, 5, skip_bias_add=True), whole)
        y, bias = row(x)
        partial = filled(RowParallelLinear(6, 5, reduce_output=False, bias=False), whole)
        return y + bias, all_reduce(partial(x)) + whole.bias

    for found in on_ranks(3, work):
        for y in found:
            close(y, whole(x))


def test_ranks_first_weights_make_up_the_whole_that_is_kept() -> None:
    """Each rank calls init_method on the whole and takes its part, so that one seed gives one model."""

    def work(rank: int) -> tuple[Tensor, ...]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            layer = ColumnParallelLinear(5, 6, init_method=nn.init.normal_, keep_master_weight=True)
        assert layer.master_weight is not None
        assert "master_weight" not in layer.state_dict()
        assert partition_of(layer.weight) is not None
        return layer.weight, layer.master_weight

    with torch.random.fork_rng():
        torch.manual_seed(3)
        wanted = nn.init.normal_(torch.empty(6, 5))
    results = [on_ranks_one(rank, work) for rank in range(2)]
    close(torch.cat([weight for weight, _ in results]), wanted)
    for _, master in results:
        close(master.data, wanted)


def on_ranks_one(rank: int, work: Any) -> Any:
    """One rank after another: torch has one random state for all threads."""
    with parallel_state.use(rank, 2):
        return work(rank)


@pytest.mark.parametrize("max_norm", [None, 1.5])
@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("tp", [1, 3])
def test_embeddings_of_odd_sizes(tp: int, by_width: bool, max_norm: float | None) -> None:
    whole, ids = nn.Embedding(13, 7, max_norm=max_norm, norm_type=3.0), torch.randint(0, 13, (2, 9))
    table = whole.weight.detach().clone()

    def work(rank: int) -> Tensor:
        layer = ParallelEmbedding(
            13,
            7,
            max_norm=max_norm,
            norm_type=3.0,
            shard_across_embedding=by_width,
            pad=True,
            use_spmd_rank=not by_width,
        )
        part = partition_of(layer.weight)
        assert part is not None
        layer.weight.copy_(part.cut(table))
        before = layer.weight.clone()
        y: Tensor = layer(ids)
        assert torch.equal(layer.weight, before), "max_norm leaves the table as it is"
        return y

    expected = whole(ids)
    for y in on_ranks(tp, work):
        close(y, expected)


def test_embeddings_that_are_not_collected_and_those_that_are_sequence_parallel() -> None:
    whole, ids = nn.Embedding(8, 6), torch.randint(0, 8, (3, 4))

    def work(rank: int) -> tuple[Tensor, ...]:
        summands = filled(ParallelEmbedding(8, 6, collect_output=False), whole)(ids)
        columns = filled(ParallelEmbedding(8, 6, collect_output=False, shard_across_embedding=True), whole)(ids)
        part = filled(ParallelEmbedding(8, 6, sequence_parallel_enabled=True), whole)(ids)
        partial = ParallelEmbedding(8, 6, sequence_parallel_enabled=True, sequence_dimension=1)
        return summands, columns, part, filled(partial, whole)(ids)

    results = on_ranks(2, work)
    expected = whole(ids)
    close(results[0][0] + results[1][0], expected)
    close(torch.cat([columns for _, columns, _, _ in results], -1), expected)
    close(torch.cat([part for _, _, part, _ in results], 0), expected.transpose(0, 1))
    close(results[0][3] + results[1][3], expected)


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("given", [{"stride": 2}, {"padding": (2, 1)}, {"dilation": (1, 2), "bias": False}])
def test_convolutions(tp: int, given: dict[str, Any]) -> None:
    first, second = nn.Conv2d(5, 7, (3, 2), **given), nn.Conv2d(7, 4, 2, **given)
    x = torch.randn(2, 5, 11, 12)

    def work(rank: int) -> tuple[Tensor, ...]:
        options = {**given, "partition_pad": True}
        gathered = filled(OutputChannelParallelConv2d(5, 7, (3, 2), **options), first)(x)
        own = filled(OutputChannelParallelConv2d(5, 7, (3, 2), **options, gather_output=False), first)(x)
        parallel = filled(InputChannelParallelConv2d(7, 4, 2, **options, input_is_parallel=True), second)(own)
        whole_input = filled(InputChannelParallelConv2d(7, 4, 2, **options), second)(gathered)
        assert own.shape[1] == -(-7 // tp)
        return gathered, parallel, whole_input

    for gathered, parallel, whole_input in on_ranks(tp, work):
        close(gathered, first(x))
        close(parallel, second(first(x)), atol=1e-5, rtol=1e-5)
        close(whole_input, second(first(x)), atol=1e-5, rtol=1e-5)


def test_convolutions_that_are_not_done_are_refused() -> None:
    with parallel_state.use(0, 2):
        for options in ({"groups": 2}, {"padding_mode": "reflect"}):
            with pytest.raises(ConfigError, match=r"groups|reflect"):
                OutputChannelParallelConv2d(4, 4, 3, **options)
        with pytest.raises(DegreeError, match="input channels of 5"):
            InputChannelParallelConv2d(5, 4, 3)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_queries_keys_and_values(fused: bool, gathered: bool) -> None:
    """Of 4 ranks, two and two share a key/value head, unless the output is gathered."""
    sizes, x = [24, 8], torch.randn(3, 2, 5)
    whole = [nn.Linear(5, size) for size in (24, 8, 8)]
    values = {
        f"{kind}_{n}": getattr(part, kind) for n, part in zip("qkv", whole, strict=True) for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        values[f"{kind}_qkv"] = torch.cat([values[f"{kind}_{n}"] for n in "qkv"])
    sharing = 1 if gathered else 2

    def work(rank: int) -> tuple[Tensor, ...]:
        layer = GQAQKVColumnParallelLinear(5, sizes, True, gathered, kv_size_multiplier=sharing, fuse_qkv=fused)
        for name, parameter in layer.named_parameters():
            part = partition_of(parameter)
            parameter.copy_(values[name] if part is None else part.cut(values[name]))
        found: tuple[Tensor, ...] = layer(x)
        return found

    for rank, found in enumerate(on_ranks(4, work)):
        for name, y, part in zip("qkv", found, whole, strict=True):
            expected = part(x)
            if not gathered:
                parts, number = (4, rank) if name == "q" else (2, rank // 2)
                expected = expected.chunk(parts, -1)[number]
            close(y, expected)


def test_queries_of_a_part_of_the_sequence_are_gathered_first() -> None:
    whole, x = nn.Linear(5, 12, bias=False), torch.randn(4, 2, 5)

    def work(rank: int) -> Tensor:
        layer = GQAQKVColumnParallelLinear(5, [4, 4], False, False, sequence_parallel_enabled=True)
        part = partition_of(next(layer.parameters()))
        assert part is not None
        next(layer.parameters()).copy_(part.cut(whole.weight))
        return torch.cat(layer(x.chunk(2)[rank]), -1)

    results = on_ranks(2, work)
    wanted = whole(x).split(4, -1)
    for place, expected in enumerate(wanted):
        close(torch.cat([y.split(2, -1)[place] for y in results], -1), expected)


def test_key_value_heads_that_do_not_fit_are_refused() -> None:
    with parallel_state.use(0, 4):
        with pytest.raises(ConfigError, match="kv_size_multiplier 3"):
            GQAQKVColumnParallelLinear(5, [8, 8], kv_size_multiplier=3)
        with pytest.raises(ConfigError, match="gather_output=False"):
            GQAQKVColumnParallelLinear(5, [8, 8], kv_size_multiplier=2)
        with pytest.raises(DegreeError, match="8 for the query and 6"):
            GQAQKVColumnParallelLinear(5, [8, 6])


class Heads(nn.Module):
    """Five heads of two, shared out; ``other`` is not of heads."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q = ColumnParallelLinear(4, 10, gather_output=False, **options)
        self.out = RowParallelLinear(10, 4, input_is_parallel=True)


def test_padded_heads_lie_whole_on_their_ranks() -> None:
    wholes = nn.Linear(4, 10), nn.Linear(10, 4)
    hooked = []

    def work(rank: int) -> tuple[Tensor, ...]:
        holder = nn.ModuleDict({"attention": Heads(), "other": ColumnParallelLinear(4, 6, gather_output=False)})
        pad_model(holder, 2, 5, [Heads], lambda module, ratio: hooked.append((type(module).__name__, ratio)))
        attention: Any = holder["attention"]
        filled(attention.q, wholes[0])
        filled(attention.out, wholes[1])
        assert holder["other"].weight.shape == (3, 4), "it is not within one of the classes"
        return attention.q.weight, attention.q.bias, attention.out.weight

    first, second = on_ranks(2, work)
    close(torch.cat([first[0], second[0]])[:10], wholes[0].weight.data)
    close(second[1][-2:], torch.zeros(2))
    close(torch.cat([first[2], second[2]], 1), nn.functional.pad(wholes[1].weight.data, (0, 2)))
    assert sorted(hooked) == sorted([("ColumnParallelLinear", 1.2), ("RowParallelLinear", 1.2), ("Heads", 1.2)] * 2)


def test_heads_are_padded_before_their_weights_are_there() -> None:
    with parallel_state.use(1, 2):
        loaded = Heads()
        loaded.q.weight.data = torch.ones(5, 4)
        with pytest.raises(ConfigError, match="pad_model first, then load"):
            pad_model(loaded, 2, 5)
        with pytest.raises(ConfigError, match="10 features cannot be padded by heads, of which there are 3"):
            pad_model(Heads(), 2, 3)
        with pytest.raises(ConfigError, match="tp_degree 4 in a group of 2"):
            pad_model(Heads(), 4, 5)
        kept = loaded.q.weight
        assert pad_model(loaded, 2, 10) is loaded
        assert loaded.q.weight is kept, "the degree divides the heads: nothing to do"


def test_extra_heads_and_their_mask() -> None:
    assert [get_number_of_extra_heads(12, tp) for tp in (4, 5, 8, 32)] == [0, 3, 4, 20]
    # Upstream's example: 48 query heads padded to 64, 8 key/value heads on 4 ranks each.
    masks = [generate_padding_mask(48, 64, 8, 32, rank) for rank in range(4)]
    assert [mask.tolist() for mask in masks] == [[True, True]] * 3 + [[False, False]]
    with pytest.raises(ConfigError, match="TRN1"):
        generate_padding_mask(48, 64, 8, 32, 0, "hardware.TRN1")


def test_the_rank_is_a_tensor() -> None:
    def work(rank: int) -> Tensor:
        module = SPMDRank(3)
        close(module.get_rank(), torch.tensor([rank], dtype=torch.int32))
        filled(module, SPMDRankOfAll())
        return module.get_rank()

    assert torch.cat(on_ranks(3, work)).tolist() == [0, 1, 2]
    with parallel_state.use(0, 2), pytest.raises(ConfigError, match="SPMDRank of 3 ranks"):
        SPMDRank(3)


class SPMDRankOfAll(nn.Module):
    """What a checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = nn.Parameter(torch.arange(3, dtype=torch.int32), requires_grad=False)


def test_what_layers_of_ones_own_are_made_of() -> None:
    whole, x = nn.Linear(5, 6), torch.randn(4, 2, 5)

    def work(rank: int) -> Tensor:
        weight = create_local_weight(whole.weight, 0, 3, 1)
        into = create_local_weight(whole.weight, 0, 3, 3, out_weight=torch.empty(3, 5))
        close(into, whole.weight[[rank, 2 + rank, 4 + rank]])
        with pytest.raises(ConfigError, match="do not make up"):
            create_local_weight(whole.weight, 0, 2, 1)
        return linear_with_async_allreduce(x.chunk(2)[rank], weight, None, False, True)

    close(torch.cat(on_ranks(2, work), -1) + whole.bias, whole(x))


def test_what_convolutions_of_ones_own_are_made_of() -> None:
    whole, x = nn.Conv2d(4, 6, (3, 2)), torch.randn(2, 4, 7, 7)
    kernel = layers._as_tuple2((3, 2))

    def work(rank: int) -> Tensor:
        weight, other = (nn.Parameter(torch.empty(3, 4, *kernel)) for _ in range(2))
        init = whole.weight.detach().clone()
        dim = layers.CONV_KERNEL_OUTPUT_CHANNEL_DIMENSION
        master = layers._initialize_parameter_cpu(weight, dim, 2, lambda tensor: tensor.copy_(init), True)
        assert master is not None
        close(master.data, init)
        layers._initialize_affine_weight_neuron(other, lambda tensor: tensor.copy_(init), dim, 2)
        close(other, weight)
        y = layers.conv2d_with_weight_grad_allreduce(x, weight, None, 1, 0, True)
        return mappings.gather_from_tensor_model_parallel_region_with_dim(y, 1)

    assert whole.bias is not None
    for y in on_ranks(2, work):
        close(y + whole.bias[:, None, None], whole(x), atol=1e-5, rtol=1e-5)


def test_a_backward_pass_is_refused_where_it_meets_a_collective() -> None:
    with parallel_state.use(0, 1):
        parallel_state.destroy_model_parallel()  # a rank stays what it is
        x = torch.randn(3, requires_grad=True)
    members = on_ranks(2, lambda rank: rank)
    assert members == [0, 1]
    parallel_state.initialize_model_parallel(1)
    try:
        y = all_reduce(x * 2).sum()
        with pytest.raises(ConfigError, match="no gradient crosses"):
            y.backward()
    finally:
        parallel_state.destroy_model_parallel()
