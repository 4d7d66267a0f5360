"""More attention heads than a model has, so that the degree divides their number.

Names and arguments are those of neuronx-distributed's ``parallel_layers.pad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tpray.errors import ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.base import first_values
from tpray.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
from tpray.parallel_layers.partition import mark_sharded, padded

PadHook = Callable[[nn.Module, float], object]


def get_number_of_extra_heads(n_head: int, tp_degree: int) -> int:
    """How many heads must be added to ``n_head`` so that ``tp_degree`` divides their number."""
    return -n_head % tp_degree


def pad_model(
    model: nn.Module,
    tp_degree: int,
    n_heads: int,
    wrapped_classes: Sequence[type] = (),
    pad_hook_fn: PadHook | None = None,
) -> nn.Module:
    """Pad a model's parallel layers to the number of heads that ``tp_degree`` divides; the model itself is returned.

    Each rank has the same number of heads then, the last ranks' being zeros. Call it before the weights are loaded:
    unless the degree divides the heads, the rows of one head lie on two ranks until then.

    Args:
        model: with `ColumnParallelLinear` layers that make the heads and `RowParallelLinear` layers that take them.
        n_heads: how many heads the model has without padding.
        wrapped_classes: only what is within modules of these classes is padded; none: everything.
        pad_hook_fn: called with each module where layers are padded, children first, and with the number of heads after
            padding divided by that before.

    Raises:
        ConfigError: the weights were loaded before, a layer's size is not one of whole heads, or ``tp_degree`` is not
            the group's.
    """
    size = parallel_state.get_tensor_model_parallel_size()
    if tp_degree != size:
        raise ConfigError(f"pad_model was given tp_degree {tp_degree} in a group of {size} ranks: give it that number")
    ratio = (n_heads + get_number_of_extra_heads(n_heads, tp_degree)) / n_heads

    def visit(module: nn.Module, inside: bool) -> None:
        inside = inside or isinstance(module, tuple(wrapped_classes))
        for child in module.children():
            visit(child, inside)
        if not inside:
            return
        if pad_hook_fn is not None:
            pad_hook_fn(module, ratio)
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and ratio > 1:
            _pad_layer(module, n_heads)

    visit(model, not wrapped_classes)
    return model


def _pad_layer(layer: ColumnParallelLinear | RowParallelLinear, n_heads: int) -> None:
    part, kind = layer.part, type(layer).__name__
    if part.full % n_heads:
        raise ConfigError(
            f"a {kind} of {part.full} features cannot be padded by heads, of which there are {n_heads}: name the "
            "classes that hold the heads' layers in wrapped_classes"
        )
    if part.stride > 1 or part.padding or not part.even or (kind == "ColumnParallelLinear" and layer.gather_output):
        raise ConfigError(f"pad_model pads a plain {kind}: leave out its stride, pad, bounds and gather_output")
    if layer.first_values != first_values(layer.weight):
        raise ConfigError(
            f"the weights of a {kind} were set before pad_model, when {layer.tp_size} ranks shared {n_heads} heads "
            "unevenly: call pad_model first, then load the weights"
        )
    share = part.full // n_heads * -(-n_heads // layer.tp_size)
    number = layer.tp_rank if layer.rank_ordering is None else layer.rank_ordering[layer.tp_rank]
    layer.part = padded(part.dim, part.full, share, number)
    parameters = {"weight": layer.weight}
    if layer.bias is not None and part.dim == 0:
        parameters["bias"] = layer.bias
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        shape[part.dim] = share
        larger = nn.Parameter(parameter.new_zeros(shape), requires_grad=False)
        mark_sharded(larger, layer.part, layer.rank_ordering)
        setattr(layer, name, larger)
    layer.pad, layer.pad_size = True, share * layer.tp_size - part.full
    if isinstance(layer, ColumnParallelLinear):
        layer.output_size, layer.output_size_per_partition = share * layer.tp_size, share
    else:
        layer.input_size, layer.input_size_per_partition = share * layer.tp_size, share


def generate_padding_mask(
    num_heads: int,
    num_heads_with_pad: int,
    num_kv_heads: int,
    tp_degree: int,
    tp_rank: int,
    hardware_type: object = None,
) -> Tensor:
    """Which of a rank's query heads are real, bool ``[num_heads_with_pad / tp_degree]``, where ranks share key heads.

    Args:
        hardware_type: None, or what upstream calls TRN2: ranks that share a key/value head lie side by side, as in
            `GQAQKVColumnParallelLinear`.

    Raises:
        ConfigError: another hardware type.
    """
    if hardware_type is not None and "TRN2" not in str(hardware_type).upper():
        raise ConfigError(f"key/value heads lie side by side in tpray, as on Trn2, and not as on {hardware_type}")
    own = num_heads_with_pad // tp_degree
    sharing = max(tp_degree // num_kv_heads, 1)
    kv_heads_per_rank = num_kv_heads * sharing // tp_degree
    first = own * (tp_rank % sharing)
    return torch.arange(first, first + own) < num_heads // num_kv_heads * kv_heads_per_rank
