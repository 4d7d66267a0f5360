"""Column- and row-parallel linear layers; with the other layers' modules, all that upstream's module of this name has.

Legend: B batch, S sequence, I input features, O output features, T tensor-parallel degree.

Names, arguments, their order and meaning follow neuronx-distributed's ``parallel_layers.layers``, which follows
Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053). They are for inference: no gradient crosses a collective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpray.errors import ConfigError
from tpray.parallel_layers import collective, parallel_state
from tpray.parallel_layers.base import (
    BaseParallelLayer,
    BaseParallelLinear,
    Device,
    InitMethod,
    Linear,
    _initialize_affine_weight_neuron,
    _initialize_parameter_cpu,
    create_local_weight,
    linear_with_async_allreduce,
)
from tpray.parallel_layers.conv import (
    CONV_KERNEL_INPUT_CHANNEL_DIMENSION,
    CONV_KERNEL_OUTPUT_CHANNEL_DIMENSION,
    BaseParallelConv,
    InputChannelParallelConv2d,
    OutputChannelParallelConv2d,
    _as_tuple2,
    conv2d_with_weight_grad_allreduce,
)
from tpray.parallel_layers.embedding import ParallelEmbedding
from tpray.parallel_layers.partition import (
    Bounds,
    Partition,
    RankOrdering,
    check_ordering,
    is_sharded,
    mark_sharded,
    own_part,
    partition,
    partition_of,
    shard_bounds,
    take,
)
from tpray.parallel_layers.spmd_rank import SPMDRank

__all__ = [
    "CONV_KERNEL_INPUT_CHANNEL_DIMENSION",
    "CONV_KERNEL_OUTPUT_CHANNEL_DIMENSION",
    "BaseParallelConv",
    "BaseParallelLayer",
    "BaseParallelLinear",
    "ColumnParallelLinear",
    "InputChannelParallelConv2d",
    "OutputChannelParallelConv2d",
    "ParallelEmbedding",
    "Partition",
    "RowParallelLinear",
    "SPMDRank",
    "_as_tuple2",
    "_initialize_affine_weight_neuron",
    "_initialize_parameter_cpu",
    "conv2d_with_weight_grad_allreduce",
    "create_local_weight",
    "is_sharded",
    "linear_with_async_allreduce",
    "mark_sharded",
    "partition_of",
    "shard_bounds",
]


class ColumnParallelLinear(BaseParallelLinear):
    """``y = x W^T + b`` with the rows of W (the output features) shared out among the ranks.

    Args:
        input_size: I.
        output_size: O, of the whole layer; T must divide it.
        bias: whether there is b.
        gather_output: True: every rank returns y ``[B, S, O]``; False: each returns its own
            ``[B, S, O/T]``, which is what a `RowParallelLinear` with ``input_is_parallel`` takes.
        dtype, device: of the parameters.
        stride: see `shard_bounds`.
        init_method: called on the whole weight, of which each rank takes its part; the default is `torch.nn.Linear`'s.
        sequence_parallel_enabled, sequence_dimension: x is this rank's part of the sequence, ``[B, S/T, I]`` if the
            dimension is 1, and is gathered first; the default dimension is 0. Source: arXiv:2205.05198, section 4.2.2.
        keep_master_weight: keep the whole weight as it was at first in ``master_weight``.
        skip_bias_add: return ``(x W^T, b)`` instead, for a caller that fuses the addition.
        pad: let T not divide O: zeros fill the last ranks' shares, and are cut off a gathered output.
        pad_alignment_size_per_rank: with ``pad``, each share is a multiple of this number.
        keep_padded_output: do not cut them off; with a bias the padded features are the dtype's lowest number.
        tensor_model_parallel_group: None, or the group of all ranks.
        reduce_dtype: of gradients, of which there are none here.
        rank_ordering: item i is the number of the part that rank i holds. Not for a gathered output.
        bounds: this rank's [start, stop) pieces of the output features, where shares differ from rank to rank;
            then T need not divide O, and the output cannot be gathered.

    Parameters: weight ``[O/T, I]``; bias ``[O/T]``, or ``[O]`` when the output is gathered: it is added
    after the gather then.

    Raises:
        DegreeError: T does not divide O.
        ConfigError: arguments that do not go together.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        stride: int = 1,
        init_method: InitMethod | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        skip_bias_add: bool = False,
        pad: bool = False,
        pad_alignment_size_per_rank: int = 1,
        keep_padded_output: bool = False,
        tensor_model_parallel_group: object = None,
        reduce_dtype: torch.dtype | None = torch.float32,
        rank_ordering: RankOrdering | None = None,
        *,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__(device)
        parallel_state.check_group(tensor_model_parallel_group)
        self.rank_ordering = check_ordering(rank_ordering)
        if gather_output and bounds is not None:
            raise ConfigError("shares that differ cannot be gathered: bounds need gather_output=False")
        if gather_output and self.rank_ordering is not None:
            raise ConfigError("parts in another order are not gathered: rank_ordering needs gather_output=False")
        if gather_output and stride > 1 and self.tp_size > 1:
            raise ConfigError("parts of a fused weight are not gathered in its order: stride needs gather_output=False")
        if gather_output and sequence_parallel_enabled:
            raise ConfigError("a sequence-parallel layer keeps its part of the output: give gather_output=False")
        self.part = partition(
            "an output size",
            0,
            output_size,
            stride,
            bounds,
            pad_alignment_size_per_rank if pad else 0,
            self.rank_ordering,
        )
        self.input_size, self.output_size_per_partition, self.stride = input_size, self.part.own, stride
        self.pad, self.keep_padded_output = pad, keep_padded_output
        self.output_size = self.part.own * self.tp_size if pad else output_size  # as upstream: with the padding
        self.pad_size = self.output_size - output_size
        self.gather_output, self.skip_bias_add, self.add_bias = gather_output, skip_bias_add, bias
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, sequence_dimension or 0
        self.reduce_dtype = reduce_dtype or dtype
        self._make_weight(
            (self.part.own, input_size), (output_size, input_size), dtype, init_method, keep_master_weight
        )
        size = output_size if gather_output else self.part.own
        self._make_bias(size if bias else None, dtype, None if gather_output else self.part)

    def forward(self, input: Tensor, slice_indices: Tensor | None = None) -> Linear:
        """x ``[..., I]``, the same on every rank -> ``[..., O]`` or ``[..., O/T]``.

        slice_indices: of the rows of this rank's weight, where only some outputs are wanted.
        """
        if self.sequence_parallel_enabled and self.tp_size > 1:
            input = collective.all_gather(input, dim=self.sequence_dimension)
        weight = self.weight if slice_indices is None else self.weight[slice_indices, :]
        late_bias = self.gather_output or self.skip_bias_add or slice_indices is not None
        y = F.linear(input, weight, None if late_bias else self.bias)
        bias: Tensor | None = self.bias if late_bias else None
        if self.gather_output and self.tp_size > 1:
            y = collective.all_gather(y, dim=-1)
        if self.gather_output and self.pad_size and self.keep_padded_output and bias is not None:
            bias = F.pad(bias, (0, self.pad_size), value=torch.finfo(bias.dtype).min)
        elif self.gather_output and self.pad_size and not self.keep_padded_output:
            y = y[..., : self.output_size - self.pad_size]
        return self._add_bias(y, bias)


class RowParallelLinear(BaseParallelLinear):
    """``y = x W^T + b`` with the columns of W (the input features) shared out among the ranks.

    Args:
        input_size: I, of the whole layer; T must divide it.
        output_size: O.
        bias: whether there is b. It is whole on every rank and added once, after the all-reduce.
        input_is_parallel: True: x is this rank's ``[..., I/T]`` (the output of a `ColumnParallelLinear`
            with ``gather_output=False``); False: x is ``[..., I]`` and each rank takes its part.
        dtype, device: of the parameters.
        stride, init_method, keep_master_weight, skip_bias_add, tensor_model_parallel_group, rank_ordering: as in
            `ColumnParallelLinear`.
        sequence_parallel_enabled, sequence_dimension: y is this rank's part of the sequence, ``[B, S/T, O]`` if the
            dimension is 1; T must divide S. The sum is all-reduced and cut: more moves than a reduce-scatter needs.
        pad: let T not divide I: zeros fill the last ranks' shares, of the weight and of a whole x.
        reduce_output: False leaves the partial sum of this rank, for a caller that reduces later.
        reduce_dtype: what the all-reduce sums in. Narrower tensors are summed in float32 without being converted.
        tile_cc: how Neuron's compiler splits collectives; not used.
        bounds: this rank's [start, stop) pieces of the input features, where shares differ from rank to rank;
            then T need not divide I.

    Parameters: weight ``[O, I/T]``, bias ``[O]``.

    Raises:
        DegreeError: T does not divide I.
        ConfigError: arguments that do not go together.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        stride: int = 1,
        init_method: InitMethod | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        skip_bias_add: bool = False,
        pad: bool = False,
        reduce_output: bool = True,
        tensor_model_parallel_group: object = None,
        reduce_dtype: torch.dtype | None = torch.float32,
        tile_cc: bool = False,
        rank_ordering: RankOrdering | None = None,
        *,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__(device)
        parallel_state.check_group(tensor_model_parallel_group)
        if sequence_parallel_enabled and not input_is_parallel:
            raise ConfigError("a sequence-parallel layer takes its part of the input: give input_is_parallel=True")
        self.rank_ordering = check_ordering(rank_ordering)
        self.part = partition("an input size", 1, input_size, stride, bounds, int(pad), self.rank_ordering)
        self.output_size, self.input_size_per_partition, self.stride = output_size, self.part.own, stride
        self.pad, self.input_is_parallel = pad, input_is_parallel
        self.input_size = self.part.own * self.tp_size if pad else input_size  # as upstream: with the padding
        self.pad_size = self.input_size - input_size
        self.skip_bias_add, self.add_bias = skip_bias_add, bias
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, sequence_dimension or 0
        self.reduce_output, self.reduce_dtype, self.tile_cc = reduce_output, reduce_dtype or dtype, tile_cc
        self._make_weight(
            (output_size, self.part.own), (output_size, input_size), dtype, init_method, keep_master_weight
        )
        self._make_bias(output_size if bias else None, dtype, None)

    def forward(self, input_: Tensor, slice_indices: Tensor | None = None) -> Linear:
        """x ``[..., I/T]`` or ``[..., I]`` -> ``[..., O]``, the same on every rank when reduced.

        slice_indices: of the columns of this rank's weight, which x has only these features of.
        """
        if not self.input_is_parallel and self.tp_size > 1:
            input_ = take(input_, -1, self.part)
        y = F.linear(input_, self.weight if slice_indices is None else self.weight[:, slice_indices])
        if self.reduce_output and self.tp_size > 1:
            y = collective.all_reduce_in(y, self.reduce_dtype)
            if self.sequence_parallel_enabled:
                y = own_part(y, self.sequence_dimension)
        return self._add_bias(y, self.bias)
