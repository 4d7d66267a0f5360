"""Upstream's parallel_state, mappings and utils: what they give on ranks, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import on_ranks
from tpray.errors import CheckpointError, ConfigError, DegreeError
from tpray.parallel_layers import mappings, parallel_state, utils
from tpray.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear, partition_of
from tpray.parallel_layers.preshard import get_sharded_checkpoint, shard_children

close = torch.testing.assert_close


def test_of_other_kinds_of_parallelism_each_rank_is_a_group_of_its_own() -> None:
    with parallel_state.use(1, 3):
        group = parallel_state.get_tensor_model_parallel_group()
        assert isinstance(group, parallel_state.ProcessGroup)
        assert (group.size(), group.rank()) == (3, 1)
        assert parallel_state.get_tensor_model_parallel_group(as_list=True) == [[0, 1, 2]]
        assert parallel_state.get_tensor_model_parallel_replica_groups() == [[0, 1, 2]]
        assert parallel_state.get_tensor_model_parallel_src_rank() == 0
        for kind in ("data", "pipeline_model", "context_model", "expert_model"):
            assert getattr(parallel_state, f"get_{kind}_parallel_size")() == 1
            assert getattr(parallel_state, f"get_{kind}_parallel_rank")() == 0
            assert getattr(parallel_state, f"get_{kind}_parallel_replica_groups")() == [[0], [1], [2]]
            assert getattr(parallel_state, f"get_{kind}_parallel_group")().size() == 1
        assert parallel_state.get_data_parallel_src_rank() == 1
        assert parallel_state.get_rank_info_str() == "DP_0_TP_1_PP_0"
        assert not parallel_state.is_global_rank_zero()
        parallel_state.set_tensor_model_parallel_size(3)
        parallel_state.set_tensor_model_parallel_rank(1)
        with pytest.raises(ConfigError, match="tp_degree=4"):
            parallel_state.set_tensor_model_parallel_size(4)
        with pytest.raises(ConfigError, match="this is rank 1"):
            parallel_state.set_tensor_model_parallel_rank(0)


def test_a_group_of_one_begins_and_ends() -> None:
    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, skip_collective_init=True)
    try:
        layer = nn.Sequential(ColumnParallelLinear(3, 4, gather_output=False), RowParallelLinear(4, 2))
        assert layer(torch.ones(1, 3)).shape == (1, 2)
        parallel_state.initialize_model_parallel()  # again
    finally:
        parallel_state.destroy_model_parallel()
    assert not parallel_state.model_parallel_is_initialized()
    assert parallel_state.get_rank_info_str() == "model_parallel_uninitialized"


def test_on_a_rank_only_its_own_degree_is_right() -> None:
    with parallel_state.use(0, 2):
        parallel_state.initialize_model_parallel(2)
        parallel_state.destroy_model_parallel()
        assert parallel_state.get_tensor_model_parallel_size() == 2, "a rank stays the rank that it is"
        with pytest.raises(ConfigError, match="this group has 2 ranks"):
            parallel_state.initialize_model_parallel(4)
        with pytest.raises(ConfigError, match="no pipeline parallelism"):
            parallel_state.initialize_model_parallel(2, 2)
    with pytest.raises(ConfigError, match="parallel_model_trace"):
        parallel_state.initialize_model_parallel(8)
    with parallel_state.use(0, 1):
        parallel_state.initialize_model_parallel(1)
    assert not parallel_state.model_parallel_is_initialized()


def test_groups_other_than_all_ranks_are_refused() -> None:
    def work(rank: int) -> Tensor:
        everyone = parallel_state.get_tensor_model_parallel_group()
        with pytest.raises(ConfigError, match="one of 1 ranks"):
            mappings.reduce_from_tensor_model_parallel_region(torch.ones(1), parallel_state.get_data_parallel_group())
        with pytest.raises(ConfigError, match="a str"):
            RowParallelLinear(4, 4, tensor_model_parallel_group="all")
        return mappings.reduce_from_tensor_model_parallel_region(torch.ones(1), everyone)

    assert [x.item() for x in on_ranks(2, work)] == [2, 2]


def test_mappings() -> None:
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))

    def work(rank: int) -> bool:
        rank_tensor = torch.tensor([rank])
        own = x[..., rank * 4 :][..., :4]
        assert mappings.copy_to_tensor_model_parallel_region(x) is x
        close(mappings.scatter_to_tensor_model_parallel_region(x), own)
        close(mappings.gather_from_tensor_model_parallel_region(own), x)
        close(mappings.gather_from_tensor_model_parallel_region_with_dim(x.chunk(2, 1)[rank], 1), x)
        close(mappings.scatter_to_sequence_parallel_region(x), x.chunk(2)[rank])
        close(mappings.scatter_to_sequence_parallel_region(x, 1), x.chunk(2, 1)[rank])
        close(mappings.gather_from_sequence_parallel_region(x.chunk(2)[rank], to_model_parallel=False), x)
        close(mappings.reduce_scatter_to_sequence_parallel_region(x * (rank + 1), 1), 3 * x.chunk(2, 1)[rank])
        close(mappings.reduce_scatter_to_tensor_model_parallel_region_with_dim(x, 2), 2 * own)
        close(mappings.scatter_input_channels_to_tensor_model_parallel_region(x), x.chunk(2, 1)[rank])
        close(mappings.scatter_to_process_group_spmd(x, 1, rank_tensor), x.chunk(2, 1)[rank])
        close(mappings.round_robin_scatter_to_process_group_spmd(x, 1, rank_tensor), x[:, rank::2])
        inside = mappings.enter_expert_parallel_region(x, scatter_gather=True)
        assert inside.shape == (4, 1, 6, 8)
        close(mappings.exit_expert_parallel_region(inside, scatter_gather=True), x)
        with pytest.raises(DegreeError, match="7 is not divisible by 2"):
            mappings.scatter_to_tensor_model_parallel_region(torch.ones(3, 7))
        with pytest.raises(ConfigError, match="'max'"):
            mappings._reduce(x, "max")
        return True

    assert on_ranks(2, work) == [True, True]


def test_utils() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert utils.divide(12, 4) == 3
    assert [utils.get_padding_length(n, 4) for n in (8, 9, 11)] == [0, 3, 1]
    assert utils.EmbeddingUtility.range_from_global_vocab_size(12, 2, 3) == (8, 12)
    assert [part.tolist() for part in utils.split_tensor_along_last_dim(x, 3)] == [p.tolist() for p in x.chunk(3, -1)]
    assert all(part.is_contiguous() for part in utils.split_tensor_along_last_dim(x, 3, contiguous_split_chunks=True))
    indices = utils.indices_split_along_dim(x, 1, 2, 3)
    assert indices is not None
    assert indices.tolist() == [4, 5]
    cast = utils.cast_all({"a": [x, 3], "b": (x.long(),)})
    assert cast["a"][0].dtype is torch.bfloat16
    assert cast["b"][0].dtype is torch.int64
    with pytest.raises(ConfigError, match="do not move it to xla"):
        utils.move_model_to_device(nn.Linear(1, 1), torch.device("xla"))


def test_upstreams_attributes_are_enough_for_a_checkpoint() -> None:
    whole = torch.arange(24.0).view(6, 4)
    for order, rows in ((None, [2, 5]), ([1, 2, 0], [0, 3])):
        with parallel_state.use(2, 3):
            own = nn.Parameter(torch.zeros(2, 4))
            utils.set_tensor_model_parallel_attributes(own, True, 0, 2, 3, order)
            part = partition_of(own)
            assert part is not None
            close(part.cut(whole), whole[rows])
            with pytest.raises(ConfigError, match="set them once"):
                utils.set_tensor_model_parallel_attributes(own, True, 0, 1)
            copied = nn.Parameter(torch.zeros(2, 4))
            utils.copy_tensor_model_parallel_attributes(copied, own)
            assert partition_of(copied) == part
    with parallel_state.use(1, 3):
        plain = nn.Parameter(torch.zeros(2))
        assert not utils.param_is_not_tensor_parallel_duplicate(plain)
        utils.set_defaults_if_not_set_tensor_model_parallel_attributes(plain)
        assert partition_of(plain) is None


def test_a_model_that_one_rank_built_cuts_checkpoints_for_every_rank() -> None:
    whole = {"up.weight": torch.randn(7, 3), "up.bias": torch.randn(7), "down.weight": torch.randn(3, 7),
             "down.bias": torch.randn(3), "stranger": torch.ones(1)}  # fmt: skip
    parts = []
    with parallel_state.use(0, 2):
        model = nn.ModuleDict(
            {
                "up": ColumnParallelLinear(3, 7, gather_output=False, pad=True),
                "down": RowParallelLinear(7, 3, input_is_parallel=True, pad=True),
            }
        )
        for rank in range(2):
            parts.append(dict(whole))
            get_sharded_checkpoint(parts[-1], model, rank, 2)
        assert "stranger" not in parts[0]
        close(torch.cat([part["up.bias"] for part in parts]), nn.functional.pad(whole["up.bias"], (0, 1)))
        close(torch.cat([part["down.weight"] for part in parts], 1), nn.functional.pad(whole["down.weight"], (0, 1)))
        close(parts[1]["down.bias"], whole["down.bias"])
        with pytest.raises(CheckpointError, match=r"up\.weight has size 5"):
            get_sharded_checkpoint({"up.weight": torch.zeros(5, 3)}, model, 0, 2)
        with pytest.raises(CheckpointError, match=r"the part of rank 1 is \[4, 2\], and the model's \[4, 3\]"):
            shard_children(model, {"up.weight": torch.zeros(8, 2)}, "", None, 1, 2)
        with pytest.raises(ConfigError, match="LoRA"):
            shard_children(model, {}, "", None, 0, 2, True)
