"""A diffusion transformer: heads that the degree does not divide are padded; inputs in a dict, output a tuple."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.trace.scripts.script import Script, noise, settled
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
from tpray.parallel_layers.pad import get_number_of_extra_heads, pad_model
from tpray.trace.trace import get_sharded_checkpoint

HEADS, HEAD, WIDTH = 5, 4, 20


class Attention(nn.Module):
    def __init__(self, width: int, other_width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads, self.inner_dim = heads, heads * head
        self.to_q: Any = nn.Linear(width, self.inner_dim)
        self.to_k: Any = nn.Linear(other_width, self.inner_dim)
        self.to_v: Any = nn.Linear(other_width, self.inner_dim)
        self.to_out: Any = nn.Linear(self.inner_dim, width)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = (
            y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(other), self.to_v(other))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        mixed: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(12, 2 * WIDTH)
        self.attention = Attention(WIDTH, WIDTH, HEADS, HEAD)
        self.cross_attention = Attention(WIDTH, 14, HEADS, HEAD)
        self.up, self.down = nn.Linear(WIDTH, 36), nn.Linear(36, WIDTH)

    def forward(self, x: Tensor, conditions: dict[str, Tensor]) -> Any:
        shift, scale = self.modulation(conditions["time"]).chunk(2, -1)
        x = x + self.attention(self.norm(x) * (1 + scale) + shift)
        x = x + self.cross_attention(x, conditions["text"])
        return (x + self.down(nn.functional.silu(self.up(self.norm(x)))),)


def shard_attention(degree: int, attention: Attention) -> None:
    heads = attention.heads
    attention.heads = (heads + get_number_of_extra_heads(heads, degree)) // degree
    attention.inner_dim = attention.heads * HEAD
    for name in ("to_q", "to_k", "to_v"):
        linear = getattr(attention, name)
        setattr(attention, name, ColumnParallelLinear(linear.in_features, linear.out_features, gather_output=False))
    attention.to_out = RowParallelLinear(
        attention.to_out.in_features, attention.to_out.out_features, input_is_parallel=True
    )
    pad_model(attention, degree, heads, wrapped_classes=(Attention,))


def whole() -> nn.Module:
    return settled(Block())


def make() -> nn.Module:
    degree, rank = (
        parallel_state.get_tensor_model_parallel_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    block = Block()
    shard_attention(degree, block.attention)
    shard_attention(degree, block.cross_attention)
    checkpoint = whole().state_dict()
    get_sharded_checkpoint(checkpoint, block, rank, degree)
    block.load_state_dict(checkpoint)
    return block


def inputs(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    conditions = {"time": noise(2, 1, 12, seed=seed + 1), "text": noise(2, 3, 14, seed=seed + 2)}
    return noise(2, 7, WIDTH, seed=seed), conditions


SCRIPT = Script("diffusion", make, [inputs(1), inputs(5)], whole, (2, 4))
