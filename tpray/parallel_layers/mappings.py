"""Tensors into and out of the region where each rank has its own part.

Names and arguments are those of neuronx-distributed's ``parallel_layers.mappings``. Every call traces; there are no
gradients, so that "copy to" returns its argument. ``process_group`` is None, or the group of all ranks.

Legend: T tensor-parallel degree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpray.errors import ConfigError
from tpray.parallel_layers import collective, parallel_state
from tpray.parallel_layers.partition import own_part
from tpray.parallel_layers.utils import divide


def copy_to_tensor_model_parallel_region(input_: Tensor, process_group: object = None) -> Tensor:
    """The tensor itself, which every rank has already."""
    parallel_state.check_group(process_group)
    return input_


def reduce_from_tensor_model_parallel_region(input_: Tensor, process_group: object = None) -> Tensor:
    """The sum of every rank's tensor, on every rank."""
    return input_ if _size(process_group) == 1 else collective.all_reduce(input_)


def scatter_to_tensor_model_parallel_region(input_: Tensor, process_group: object = None) -> Tensor:
    """This rank's part of the last dimension."""
    return _split_along_dim(input_, -1, process_group)


def gather_from_tensor_model_parallel_region(input_: Tensor, process_group: object = None) -> Tensor:
    """Every rank's tensor, joined along the last dimension."""
    return _gather_along_dim(input_, -1, process_group)


def gather_from_tensor_model_parallel_region_with_dim(
    input_: Tensor, gather_dim: int, process_group: object = None
) -> Tensor:
    """Every rank's tensor, joined along ``gather_dim``."""
    return _gather_along_dim(input_, gather_dim, process_group)


def reduce_scatter_to_tensor_model_parallel_region_with_dim(
    input_: Tensor, partition_dim: int, process_group: object = None
) -> Tensor:
    """This rank's part, along ``partition_dim``, of the sum of every rank's tensor."""
    return _reduce_scatter_along_dim(input_, partition_dim, process_group)


def scatter_input_channels_to_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """This rank's part of dimension 1."""
    return _split_along_dim(input_, 1)


def scatter_to_sequence_parallel_region(
    input_: Tensor, sequence_dimension: int = 0, process_group: object = None
) -> Tensor:
    """This rank's part of the sequence."""
    return _split_along_dim(input_, sequence_dimension, process_group)


def gather_from_sequence_parallel_region(
    input_: Tensor,
    sequence_dimension: int = 0,
    to_model_parallel: bool = True,
    process_group: object = None,
    tile_cc: bool = False,
) -> Tensor:
    """The whole sequence. to_model_parallel, tile_cc: about gradients, and about Neuron's compiler; not used."""
    return _gather_along_dim(input_, sequence_dimension, process_group)


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor, sequence_dimension: int = 0, process_group: object = None, dtype: torch.dtype | None = None
) -> Tensor:
    """This rank's part of the sequence, of the sum of every rank's tensor. dtype: of the gradient; not used."""
    return _reduce_scatter_along_dim(input_, sequence_dimension, process_group)


def reduce_from_context_model_parallel_region(input_: Tensor, process_group: object = None) -> Tensor:
    """With a group, the sum over it; without one the tensor itself: each rank is a context-parallel group of one."""
    return input_ if process_group is None else reduce_from_tensor_model_parallel_region(input_, process_group)


def enter_expert_parallel_region(x: Tensor, scatter_gather: bool) -> Tensor:
    """``[E, C, H]`` -> ``[E, 1, C, H]``: there is one expert-parallel group, which has all experts."""
    return x.unsqueeze(1)


def exit_expert_parallel_region(x: Tensor, scatter_gather: bool) -> Tensor:
    """``[E, 1, C, H]`` -> ``[E, C, H]``."""
    return x.squeeze(1)


def scatter_to_process_group_spmd(
    input_: Tensor, partition_dim: int, rank: Tensor, process_group: object = None
) -> Tensor:
    """The part of ``partition_dim`` that belongs to ``rank``, int ``[1]``."""
    own = divide(input_.shape[partition_dim], _size(process_group))
    return input_.index_select(partition_dim, torch.arange(own, device=input_.device) + rank * own)


def round_robin_scatter_to_process_group_spmd(
    input_: Tensor, partition_dim: int, rank: Tensor, process_group: object = None
) -> Tensor:
    """Every T-th item of ``partition_dim``, from that with the number ``rank``, int ``[1]``."""
    size = _size(process_group)
    own = divide(input_.shape[partition_dim], size)
    return input_.index_select(partition_dim, torch.arange(own, device=input_.device) * size + rank)


def _size(process_group: object) -> int:
    parallel_state.check_group(process_group)
    return parallel_state.get_tensor_model_parallel_size()


# Scripts import these, too, under upstream's names.


def _reduce(input_: Tensor, computation: str = "sum", process_group: object = None) -> Tensor:
    if computation != "sum":
        raise ConfigError(f"tpray's ranks sum; {computation!r} is not there: gather the tensors and combine them")
    return reduce_from_tensor_model_parallel_region(input_, process_group)


def _split_along_dim(input_: Tensor, partition_dim: int, process_group: object = None) -> Tensor:
    size = _size(process_group)
    if size == 1:
        return input_
    divide(input_.shape[partition_dim], size)  # or it says that it cannot
    return own_part(input_, partition_dim)


def _split_along_last_dim(input_: Tensor, process_group: object = None) -> Tensor:
    return _split_along_dim(input_, -1, process_group)


def _split_along_first_dim(input_: Tensor, process_group: object = None) -> Tensor:
    return _split_along_dim(input_, 0, process_group)


def _gather_along_dim(x: Tensor, partition_dim: int, process_group: object = None, tile_cc: bool = False) -> Tensor:
    return x if _size(process_group) == 1 else collective.all_gather(x, dim=partition_dim)


def _gather_along_last_dim(x: Tensor, process_group: object = None) -> Tensor:
    return _gather_along_dim(x, -1, process_group)


def _gather_along_first_dim(x: Tensor, process_group: object = None) -> Tensor:
    return _gather_along_dim(x, 0, process_group)


def _reduce_scatter_along_dim(x: Tensor, partition_dim: int, process_group: object = None) -> Tensor:
    return _split_along_dim(reduce_from_tensor_model_parallel_region(x, process_group), partition_dim)


def _reduce_scatter_along_first_dim(x: Tensor, process_group: object = None) -> Tensor:
    return _reduce_scatter_along_dim(x, 0, process_group)


def _reduce_scatter_along_last_dim(x: Tensor, process_group: object = None) -> Tensor:
    return _reduce_scatter_along_dim(x, -1, process_group)
