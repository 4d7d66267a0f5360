"""What parallel layers share: this rank, how parameters are made and cut, and how checkpoints are padded for them.

Legend: B batch, S sequence, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpray.errors import CheckpointError, ConfigError
from tpray.parallel_layers import collective, parallel_state
from tpray.parallel_layers.partition import Partition, RankOrdering, fill, mark_sharded, partition_of, shard_bounds
from tpray.parallel_layers.utils import set_tensor_model_parallel_attributes

InitMethod = Callable[[Tensor], object]
Device = torch.device | str | None
Linear = Tensor | tuple[Tensor, Tensor | None]
"""What a linear layer returns: y, or y and the bias where that is left to the caller."""


class BaseParallelLayer(nn.Module):
    """A layer whose parameters are shared out among the ranks.

    Args:
        device: where its parameters are made; None: torch's default.

    Raises:
        ConfigError: this thread is no rank; see `parallel_state`.
    """

    rank_ordering: RankOrdering | None = None

    def __init__(self, device: Device = None) -> None:
        super().__init__()
        self.device = device
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_size()
        self.tensor_parallel_group = parallel_state.get_tensor_model_parallel_group()

    def make_parameter(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        part: Partition | None = None,
        init: InitMethod | None = None,
        full_shape: Sequence[int] | None = None,
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """A parameter of this rank's ``shape``, and the whole ``full_shape`` that ``init`` was called on."""
        made = nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=self.device), requires_grad=False)
        if part is not None:
            mark_sharded(made, part, self.rank_ordering)
        return made, None if init is None else fill(made, init, full_shape or shape)

    def preshard_hook(self, model_state_dict: dict[str, Any], prefix: str) -> None:
        """Upstream's call before a whole checkpoint is cut: pad one of this layer's tensors with zeros, in place.

        prefix: the tensor's name in ``model_state_dict``; it ends in the parameter's name.

        Raises:
            CheckpointError: the tensor has another size than this layer.
        """
        parameter = getattr(self, prefix.rpartition(".")[2], None)
        part = None if parameter is None else partition_of(parameter)
        if part is None or prefix not in model_state_dict or not self._padding_of(part):
            return
        whole = model_state_dict[prefix]
        if whole.shape[part.dim] != part.full:
            raise CheckpointError(
                f"{prefix} has size {whole.shape[part.dim]} in dimension {part.dim}, and its layer {part.full}"
            )
        after = 2 * (whole.dim() - 1 - part.dim)  # F.pad counts from the last dimension
        model_state_dict[prefix] = F.pad(whole, (0,) * (after + 1) + (self._padding_of(part),))

    def _padding_of(self, part: Partition) -> int:
        """How many zeros all ranks' parts have together."""
        return part.own * self.tp_size - part.full if part.even else 0


class BaseParallelLinear(BaseParallelLayer):
    """A linear layer whose weight is shared out; upstream's base for layers of one's own.

    A subclass makes ``weight`` and ``bias``, marks what is a part with
    `tpray.parallel_layers.utils.set_tensor_model_parallel_attributes`, and has a `forward`.
    """

    autograd_func_class: type | None = None  # upstream's place for gradients
    weight: nn.Parameter
    bias: nn.Parameter | None
    part: Partition
    master_weight: nn.Parameter | None = None
    first_values: list[float] | None = None
    arg_init_method: InitMethod | None = None
    skip_bias_add: bool = False

    def _init_weight(self, weight: Tensor) -> None:
        (self.arg_init_method or _linear_init)(weight)

    def _init_bias(self) -> None:
        """Zeros: a whole bias must be the same on every rank."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check_pad_false_for_training(self) -> None:
        """Padding is as good in training mode here, where no gradient is ever computed."""

    def _make_weight(
        self,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        dtype: torch.dtype,
        init_method: InitMethod | None,
        keep: bool,
    ) -> None:
        self.dtype, self.arg_init_method, self.keep_master_weight = dtype, init_method, keep
        self.weight_partition_dim, self.weight_shape = self.part.dim, shape
        self.weight, whole = self.make_parameter(shape, dtype, self.part, self._init_weight, full_shape)
        self.device = self.weight.device
        # A plain attribute: it is no parameter that a checkpoint would have.
        self.__dict__["master_weight"] = whole if keep else None
        self.__dict__["first_values"] = first_values(self.weight)

    def _make_bias(self, size: int | None, dtype: torch.dtype, part: Partition | None) -> None:
        self.bias = None
        if size is not None:
            self.bias = self.make_parameter((size,), dtype, part)[0]
            if not self.bias.is_meta:
                self._init_bias()

    def _add_bias(self, y: Tensor, bias: Tensor | None) -> Linear:
        if self.skip_bias_add:
            return y, bias
        return y if bias is None else y + bias


def first_values(weight: Tensor, count: int = 8) -> list[float] | None:
    """The first few numbers of a weight, to see later whether it was filled; None on the meta device."""
    return None if weight.is_meta else [float(x) for x in weight.detach().flatten()[:count]]


def _linear_init(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)  # torch.nn.Linear's


def create_local_weight(
    full_weight: Tensor, partition_dim: int, per_partition_size: int, stride: int, out_weight: Tensor | None = None
) -> Tensor:
    """This rank's part of a whole weight, which all ranks' ``per_partition_size`` make up.

    out_weight: filled and returned, if it is given.
    """
    state = parallel_state.current()
    full = full_weight.shape[partition_dim]
    if per_partition_size * state.size != full:
        raise ConfigError(f"{state.size} parts of {per_partition_size} do not make up a dimension of {full}")
    part = Partition(partition_dim, full, shard_bounds(full, state.rank, state.size, stride), stride).cut(full_weight)
    if out_weight is None:
        return part
    with torch.no_grad():
        return out_weight.copy_(part)


def _initialize_parameter_cpu(
    param: nn.Parameter,
    partition_dim: int,
    num_partitions: int,
    init_method: InitMethod,
    return_master_param: bool = False,
    *,
    param_dtype: torch.dtype = torch.float32,
    stride: int = 1,
) -> nn.Parameter | None:
    """Mark a parameter as this rank's part, and give it its part of a whole that ``init_method`` is called on.

    Scripts with layers of their own import this and the next function, under upstream's names.
    """
    set_tensor_model_parallel_attributes(param, True, partition_dim, stride, num_partitions)
    shape = list(param.shape)
    shape[partition_dim] *= num_partitions
    whole = fill(param, init_method, shape)
    return whole if return_master_param else None


def _initialize_affine_weight_neuron(
    weight: nn.Parameter, init_method: InitMethod, partition_dim: int, num_partitions: int, stride: int = 1
) -> None:
    """The same, of which nothing is returned."""
    _initialize_parameter_cpu(weight, partition_dim, num_partitions, init_method, stride=stride)


def linear_with_async_allreduce(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    async_grad_allreduce: bool,
    sequence_parallel_enabled: bool,
    sequence_dimension: int | None = 0,
    autograd_func_class: type | None = None,
    save_for_backward: bool = True,
    process_group: object = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``x W^T + b``, with x ``[..., I]`` gathered along the sequence first where it is sequence-parallel.

    What is about gradients (async_grad_allreduce, autograd_func_class, save_for_backward, reduce_dtype) is not used.
    """
    parallel_state.check_group(process_group)
    if sequence_parallel_enabled and parallel_state.get_tensor_model_parallel_size() > 1:
        input = collective.all_gather(input, dim=sequence_dimension or 0)
    return F.linear(input, weight, bias)
