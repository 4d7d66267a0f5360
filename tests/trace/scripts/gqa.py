"""Grouped-query attention: two key/value heads, and more ranks than these, so that ranks share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.trace.scripts.script import Script, noise, settled
from tpray.modules.qkv_linear import GQAQKVColumnParallelLinear
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import RowParallelLinear
from tpray.trace.trace import get_sharded_checkpoint

HEADS, KEY_HEADS, HEAD, WIDTH = 8, 2, 4, 20


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_q = nn.Parameter(torch.empty(HEADS * HEAD, WIDTH))
        self.weight_k = nn.Parameter(torch.empty(KEY_HEADS * HEAD, WIDTH))
        self.weight_v = nn.Parameter(torch.empty(KEY_HEADS * HEAD, WIDTH))
        self.bias_q = nn.Parameter(torch.empty(HEADS * HEAD))
        self.bias_k = nn.Parameter(torch.empty(KEY_HEADS * HEAD))
        self.bias_v = nn.Parameter(torch.empty(KEY_HEADS * HEAD))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = nn.functional.linear
        return (
            linear(x, self.weight_q, self.bias_q),
            linear(x, self.weight_k, self.bias_k),
            linear(x, self.weight_v, self.bias_v),
        )


class Attention(nn.Module):
    def __init__(self, qkv: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.qkv, self.out = qkv, out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*y.shape[:2], -1, HEAD).transpose(1, 2) for y in self.qkv(x))
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, -1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


def whole() -> nn.Module:
    return settled(Attention(Separate(), nn.Linear(HEADS * HEAD, WIDTH)))


def _make(fused: bool) -> nn.Module:
    degree, rank = parallel_state.get_tensor_model_parallel_size(), parallel_state.get_tensor_model_parallel_rank()
    sizes = [HEADS * HEAD, KEY_HEADS * HEAD]
    sharing = max(1, degree // KEY_HEADS)
    options: dict[str, Any] = {"gather_output": False, "kv_size_multiplier": sharing, "fuse_qkv": fused}
    qkv = GQAQKVColumnParallelLinear(WIDTH, sizes, **options)
    model = Attention(qkv, RowParallelLinear(HEADS * HEAD, WIDTH, input_is_parallel=True))
    checkpoint = whole().state_dict()
    if fused:
        for kind in ("weight", "bias"):
            checkpoint[f"qkv.{kind}_qkv"] = torch.cat([checkpoint.pop(f"qkv.{kind}_{part}") for part in "qkv"])
    get_sharded_checkpoint(checkpoint, model, rank, degree)
    model.load_state_dict(checkpoint)
    return model


def make_fused() -> nn.Module:
    return _make(True)


def make_separate() -> nn.Module:
    return _make(False)


CALLS = [(noise(2, 5, WIDTH, seed=1),), (noise(2, 5, WIDTH, seed=2),)]
FUSED = Script("gqa-fused", make_fused, CALLS, whole, (2, 4, 8))
SEPARATE = Script("gqa-separate", make_separate, CALLS, whole, (2, 4))
