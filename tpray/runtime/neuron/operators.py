"""Operators that Neuron's compiler for XLA does not know, written in those that it knows.

Source of what it knows: `tpray.runtime.neuron.hlo`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_P = 0.3275911


def erf(x: Tensor) -> Tensor:
    """The error function, by float32: it differs from the exact one by 6e-7 at most, rounding included.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, formula 7.1.26.
    """
    wide = x.float()
    size = wide.abs()
    t = 1.0 / (1.0 + _ERF_P * size)
    series = torch.zeros_like(t)
    for coefficient in reversed(_ERF):
        series = (series + coefficient) * t
    return (wide.sign() * (1.0 - series * torch.exp(-size * size))).to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """See `torch.nn.functional.gelu`; computed in float32, as torch does it for narrower types."""
    wide = x.float()
    if approximate == "tanh":
        inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide * wide * wide)
        return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * wide * (1.0 + erf(wide * 0.5**0.5))).to(x.dtype)


def fill(x: Tensor, value: Tensor) -> Tensor:
    """See `torch.Tensor.fill_`; torch-xla would read the ``value``, of one element, on the CPU."""
    return x.copy_(value.expand(x.shape))


REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.erf.default: erf,
    torch.ops.aten.gelu.default: gelu,
    torch.ops.aten.fill_.Tensor: fill,
}
