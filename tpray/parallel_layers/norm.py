"""A norm over the features of all heads, of which each rank has its own heads'.

Some architectures (OLMo 2, ESM C) norm queries and keys before they are taken apart into heads. To gather them first
would move all their features; here the ranks exchange one number of each token, or two.

Legend: B batch, S sequence, F features of all heads, f of this rank's own, T ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers import collective, parallel_state
from tpray.parallel_layers.partition import Bounds, Partition, mark_sharded


class SplitNorm(nn.Module):
    """This rank's part of a root-mean-square norm, or of a layer norm, over F features.

    Args:
        whole: the stock norm, on the meta device.
        bounds: this rank's [start, stop) pieces of the features.
        holders: how many ranks hold these same features.
        dtype: of the parameters.

    Parameters: weight and bias ``[f]``, as far as the stock norm has them.

    Raises:
        UnsupportedModelError: it is another kind of norm.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, whole: Any, bounds: Bounds, holders: int, dtype: torch.dtype) -> None:
        super().__init__()
        kind = type(whole).__name__
        self.centred = isinstance(whole, nn.LayerNorm)
        if not self.centred and "RMSNorm" not in kind:
            raise UnsupportedModelError(f"tpray has no part of a {kind} over all heads: only of RMSNorm and LayerNorm")
        self.eps: float = whole.eps if hasattr(whole, "eps") else whole.variance_epsilon
        self.full, self.holders = len(whole.weight), holders
        for name in ("weight", "bias"):
            stock = getattr(whole, name, None)
            self.register_parameter(name, None if stock is None else self._part(stock, bounds, dtype))

    def _part(self, stock: Tensor, bounds: Bounds, dtype: torch.dtype) -> nn.Parameter:
        part = Partition(0, self.full, tuple(bounds), even=False)
        made = nn.Parameter(torch.empty(part.own, dtype=dtype, device=stock.device), requires_grad=False)
        mark_sharded(made, part)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, S, f]`` -> the same shape. It is normed in float32, as transformers does."""
        own = x.float()
        if self.centred:
            own = own - self._mean(own)
        own = own * torch.rsqrt(self._mean(own * own) + self.eps) * self.weight
        return (own if self.bias is None else own + self.bias).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over all ranks' features ``[B, S, 1]``; what several ranks hold counts once."""
        total = x.sum(-1, keepdim=True) / (self.full * self.holders)
        return collective.all_reduce(total) if parallel_state.get_tensor_model_parallel_size() > 1 else total
