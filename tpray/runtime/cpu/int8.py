"""Linear layers in int8: weights quantised once per output channel, activations per token as they come.

Legend: T tokens, I and O features. ``x [T, I]`` is about ``s_t * (u - 128)`` with u uint8 and a scale per token, and
``W [O, I]`` about ``s_o * w`` with w int8 and a scale per channel; so ``x W^T`` is ``s_t * s_o * sum((u - 128) w)``,
the sum exact in int32. Each token has a scale of its own, so a row's scores do not depend on its neighbours in a batch.

Activations are unsigned because VNNI multiplies uint8 by int8: signed ones are several times slower on these cores.

Source: LLM.int8() (arXiv:2208.07339, vector-wise quantisation); oneDNN's operators as torch's own x86 quantisation
backend calls them, torch/_inductor/fx_passes/quantization.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from tpray.runtime.cpu.passes import aten, nodes_calling, substitute, tensor_of, tidy

onednn: Any = torch.ops.onednn

_ONE = torch.tensor([1.0])  # the token's scale is multiplied in afterwards: oneDNN takes one scale for all of x
_MIDDLE = torch.tensor([128], dtype=torch.int32)


class Int8Weight(NamedTuple):
    """A weight as oneDNN multiplies it.

    values: int8, prepacked. scales: float32 ``[O]``. zeros: int32 zeros ``[O]``.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """A weight ``[O, I]``, quantised and prepacked."""
        values, scales = quantise(weight)
        packed = onednn.qlinear_prepack(values, [256, values.shape[1]])
        return cls(packed, scales, torch.zeros(len(scales), dtype=torch.int32))


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, ``[..., I]`` -> ``[..., O]``, in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    largest = rows.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12)
    # Conversion to an integer cuts off: with the half it rounds. By way of int32, because that is vectorised.
    quantised = torch.mul(rows, 127 / largest).add_(128.5).to(torch.int32).to(torch.uint8)
    y = onednn.qlinear_pointwise.tensor(quantised, _ONE, _MIDDLE, *weight, None, 1.0, 0, x.dtype, "none", [], "")
    token_scales = (largest / 127).to(x.dtype)
    y = y.mul_(token_scales) if bias is None else torch.addcmul(bias, y, token_scales)
    return y.view(*x.shape[:-1], y.shape[-1])


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[O, I]`` as int8 and its float32 scale per output channel ``[O]``, symmetric."""
    scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def mark_int8(module: GraphModule, chosen: Callable[[str], bool]) -> int:
    """Mark the linear layers that are to compute in int8. chosen: by the layer's path in the model."""
    marked = 0
    for node in nodes_calling(module, aten.linear.default):
        if tensor_of(module, node.args[1]) is not None:
            path = str(node.args[1].target).removeprefix("model.").removesuffix(".weight")
            node.meta["int8"] = chosen(path)
            marked += node.meta["int8"]
    return marked


def quantise_linears(module: GraphModule) -> int:
    """The marked linear layers as `int8_linear`, whose weight is quantised when it is loaded."""
    found = 0
    for node in nodes_calling(module, aten.linear.default):
        if not node.meta.get("int8"):
            continue
        x, source, bias = (*node.args, None)[:3]
        with module.graph.inserting_before(node):
            linear = module.graph.call_function(int8_linear, (x, source, bias))
        substitute(node, linear)
        found += 1
    tidy(module)
    return found
