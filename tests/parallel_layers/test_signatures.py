"""neuronx-distributed's names take its arguments in its order, so that a script that gives them by place is right.

Source: neuronx-distributed, commit fbac349.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pytest

WANTED = """
parallel_layers.layers:ColumnParallelLinear
    input_size output_size bias gather_output dtype device stride init_method sequence_parallel_enabled
    sequence_dimension keep_master_weight skip_bias_add pad pad_alignment_size_per_rank keep_padded_output
    tensor_model_parallel_group reduce_dtype rank_ordering
parallel_layers.layers:RowParallelLinear
    input_size output_size bias input_is_parallel dtype device stride init_method sequence_parallel_enabled
    sequence_dimension keep_master_weight skip_bias_add pad reduce_output tensor_model_parallel_group reduce_dtype
    tile_cc rank_ordering
parallel_layers.layers:ParallelEmbedding
    num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse init_method device dtype
    shard_across_embedding pad sequence_parallel_enabled tensor_model_parallel_group use_spmd_rank
    sequence_dimension tile_cc rank_ordering collect_output
parallel_layers.layers:BaseParallelLinear
    device
parallel_layers.layers:OutputChannelParallelConv2d
    in_channels out_channels kernel_size stride padding dilation groups bias padding_mode gather_output dtype device
    init_method keep_master_weight partition_pad
parallel_layers.layers:InputChannelParallelConv2d
    in_channels out_channels kernel_size stride padding dilation groups bias padding_mode input_is_parallel dtype
    device init_method keep_master_weight partition_pad
parallel_layers.layers:SPMDRank
    world_size tensor_model_parallel_size
parallel_layers.layers:create_local_weight
    full_weight partition_dim per_partition_size stride out_weight
modules.qkv_linear:GQAQKVColumnParallelLinear
    input_size output_sizes bias gather_output dtype device init_method sequence_parallel_enabled keep_master_weight
    kv_size_multiplier fuse_qkv reduce_dtype
parallel_layers.pad:get_number_of_extra_heads
    n_head tp_degree
parallel_layers.pad:pad_model
    model tp_degree n_heads wrapped_classes pad_hook_fn
parallel_layers.pad:generate_padding_mask
    num_heads num_heads_with_pad num_kv_heads tp_degree tp_rank hardware_type
parallel_layers.utils:divide
    numerator denominator
parallel_layers.utils:get_padding_length
    numerator denominator
parallel_layers.utils:set_tensor_model_parallel_attributes
    tensor is_parallel dim stride num_partitions rank_ordering
parallel_layers.utils:split_tensor_along_last_dim
    tensor num_partitions contiguous_split_chunks
parallel_layers.utils:indices_split_along_dim
    tensor dim rank num_partitions
parallel_layers.mappings:copy_to_tensor_model_parallel_region
    input_ process_group
parallel_layers.mappings:reduce_from_tensor_model_parallel_region
    input_ process_group
parallel_layers.mappings:scatter_to_tensor_model_parallel_region
    input_ process_group
parallel_layers.mappings:gather_from_tensor_model_parallel_region
    input_ process_group
parallel_layers.mappings:gather_from_tensor_model_parallel_region_with_dim
    input_ gather_dim process_group
parallel_layers.mappings:scatter_to_sequence_parallel_region
    input_ sequence_dimension process_group
parallel_layers.mappings:gather_from_sequence_parallel_region
    input_ sequence_dimension to_model_parallel process_group tile_cc
parallel_layers.mappings:reduce_scatter_to_sequence_parallel_region
    input_ sequence_dimension process_group dtype
parallel_layers.mappings:reduce_scatter_to_tensor_model_parallel_region_with_dim
    input_ partition_dim process_group
parallel_layers.mappings:scatter_to_process_group_spmd
    input_ partition_dim rank process_group
parallel_layers.parallel_state:initialize_model_parallel
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    skip_collective_init lnc_size mesh_only
parallel_layers.parallel_state:destroy_model_parallel
parallel_layers.parallel_state:get_tensor_model_parallel_group
    as_list
parallel_layers.parallel_state:get_data_parallel_group
    as_list
trace.trace:parallel_model_trace
    func example_inputs states compiler_workdir compiler_args inline_weights_to_neff bucket_config tp_degree
    max_parallel_compilations spmd_mode checkpoint_loader_callable force_custom_init_on_device serialization_path
trace.trace:get_sharded_checkpoint
    checkpoint model rank tp_degree is_cached
trace.trace:shard_children
    module checkpoint prefix dtype rank tp_degree is_lora_cpu_shard
trace.trace:parallel_model_save
    model save_dir
"""
"""A name, and below it, set in, its arguments."""
NAMES = re.findall(r"^(\S+)\n((?: .*\n)*)", WANTED, re.MULTILINE)


@pytest.mark.parametrize(("name", "arguments"), NAMES)
def test_arguments_are_upstreams_in_its_order(name: str, arguments: str) -> None:
    module, _, attribute = name.partition(":")
    parameters = inspect.signature(getattr(import_module(f"tpray.{module}"), attribute)).parameters.values()
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == arguments.split()


def test_modules_and_names_are_attributes_of_their_packages() -> None:
    import tpray

    for name in ("layers", "mappings", "pad", "parallel_state", "utils", "ColumnParallelLinear", "load"):
        assert getattr(tpray.parallel_layers, name) is not None
    assert (
        tpray.parallel_layers.initialize_model_parallel
        is tpray.parallel_layers.parallel_state.initialize_model_parallel
    )
    with pytest.raises(AttributeError, match="parallel_cross_entropy"):
        tpray.parallel_layers.parallel_cross_entropy  # noqa: B018
