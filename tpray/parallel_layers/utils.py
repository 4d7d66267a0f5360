"""Arithmetic of parts, and the attributes of sharded parameters.

Names and arguments are those of neuronx-distributed's ``parallel_layers.utils``; what there is about XLA devices and
gradients is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpray.errors import ConfigError, DegreeError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.partition import is_sharded

_DEFAULTS: Mapping[str, Any] = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
    "num_partitions": 1,
}
_COPIED = (*_DEFAULTS, "rank_ordering", "partition")


class EmbeddingUtility:
    """Which ids [first, last) of a vocabulary are a rank's."""

    @staticmethod
    def range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        """From the number of ids that each rank has."""
        return rank * per_partition_vocab_size, (rank + 1) * per_partition_vocab_size

    @staticmethod
    def range_from_global_vocab_size(global_vocab_size: int, rank: int, world_size: int) -> tuple[int, int]:
        """From the number of all ids, which ``world_size`` must divide."""
        own = divide(global_vocab_size, world_size)
        return EmbeddingUtility.range_from_per_partition_vocab_size(own, rank, world_size)


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise unless the one divides the other.

    Raises:
        DegreeError: both numbers are named.
    """
    if numerator % denominator:
        raise DegreeError(f"{numerator} is not divisible by {denominator}: choose a degree that divides it, or pad it")


def divide(numerator: int, denominator: int) -> int:
    """The quotient of numbers that divide without rest.

    Raises:
        DegreeError: they do not.
    """
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def get_padding_length(numerator: int, denominator: int) -> int:
    """What must be added to the one so that the other divides it."""
    return -numerator % denominator


def split_tensor_along_dim(
    tensor: Tensor, dim: int, num_partitions: int, contiguous_split_chunks: bool = False
) -> Sequence[Tensor]:
    """Equal parts of a dimension, as views; as copies that are contiguous if asked for."""
    parts = torch.split(tensor, divide(tensor.shape[dim], num_partitions), dim)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else list(parts)


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> Sequence[Tensor]:
    """See `split_tensor_along_dim`."""
    return split_tensor_along_dim(tensor, tensor.dim() - 1, num_partitions, contiguous_split_chunks)


def split_tensor_along_second_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> Sequence[Tensor]:
    """See `split_tensor_along_dim`; the dimension is number 1."""
    return split_tensor_along_dim(tensor, 1, num_partitions, contiguous_split_chunks)


def indices_split_along_dim(tensor: Tensor | None, dim: int, rank: int, num_partitions: int) -> Tensor | None:
    """The indices of a rank's part of a dimension, int64; None for no tensor."""
    if tensor is None:
        return None
    own = divide(tensor.shape[dim], num_partitions)
    return torch.arange(own, device=tensor.device) + rank * own


def param_is_not_tensor_parallel_duplicate(param: Tensor) -> bool:
    """Whether this rank's copy is the one that counts: a part does, and of a whole tensor that of rank 0."""
    return is_sharded(param) or parallel_state.get_tensor_model_parallel_rank() == 0


def set_tensor_model_parallel_attributes(
    tensor: Tensor,
    is_parallel: bool,
    dim: int,
    stride: int,
    num_partitions: int = -1,
    rank_ordering: list[int] | None = None,
) -> None:
    """Say of a parameter that it is this rank's part of a larger one, so that checkpoints are cut for it.

    Args:
        dim: along which it was cut.
        stride: see `shard_bounds`.
        num_partitions: into how many parts; -1: as many as there are ranks.
        rank_ordering: item i is the number of the part that rank i holds.

    Raises:
        ConfigError: it was marked before, or the ordering lacks a rank.
    """
    if any(hasattr(tensor, name) for name in _DEFAULTS):
        raise ConfigError("this tensor has its tensor_model_parallel attributes already: set them once")
    size = parallel_state.get_tensor_model_parallel_size()
    if rank_ordering is not None and not set(range(size)) <= set(rank_ordering):
        raise ConfigError(f"rank_ordering {rank_ordering} lacks one of the ranks 0 to {size - 1}")
    values = (is_parallel, dim, stride, size if num_partitions == -1 else num_partitions)
    for name, value in zip(_DEFAULTS, values, strict=True):
        setattr(tensor, name, value)
    tensor.rank_ordering = rank_ordering  # type: ignore[attr-defined]


def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor: Tensor) -> None:
    """Mark a tensor as whole unless it is marked."""
    for name, value in _DEFAULTS.items():
        if not hasattr(tensor, name):
            setattr(tensor, name, value)


def copy_tensor_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Mark a tensor as another one is."""
    for name in _COPIED:
        if hasattr(source_tensor, name):
            setattr(destination_tensor, name, getattr(source_tensor, name))


def cast_tensor(
    tensor: Tensor, from_dtype: torch.dtype = torch.float32, to_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The tensor in another dtype, if it has the one dtype."""
    return tensor.to(to_dtype) if tensor.dtype == from_dtype else tensor


def cast_all(state: Any, from_dtype: torch.dtype = torch.float32, to_dtype: torch.dtype = torch.bfloat16) -> Any:
    """`cast_tensor` for each tensor in lists, tuples and dicts; everything else as it is."""
    if isinstance(state, Tensor):
        return cast_tensor(state, from_dtype, to_dtype)
    if isinstance(state, dict):
        return {key: cast_all(value, from_dtype, to_dtype) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(cast_all(value, from_dtype, to_dtype) for value in state)
    return state


def cast_if_autocast_enabled(*args: Any) -> Any:
    """The arguments as they are: torch.autocast has no part in a traced program."""
    return args


def verify_casted_dtype(value: Any) -> None:
    """Nothing to verify; see `cast_if_autocast_enabled`."""


def is_torch_version_greater_than_2() -> bool:
    """True; tpray needs a later torch."""
    return True


def get_local_world_size() -> int:
    """How many ranks are on this machine: all."""
    return parallel_state.get_tensor_model_parallel_size()


def move_model_to_device(model: nn.Module, device: torch.device) -> None:
    """Nothing to do for the CPU, where models are built; the runtime moves what it has traced.

    Raises:
        ConfigError: another device.
    """
    if torch.device(device).type != "cpu":
        raise ConfigError(f"a model is built on the CPU and moved when it is loaded: do not move it to {device}")
