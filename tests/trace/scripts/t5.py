"""A T5 encoder: heads and position biases shared out, a feed-forward of layers of one's own, weights cut by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tests.trace.scripts.script import Script, settled, some_ids
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import BaseParallelLinear, ColumnParallelLinear, RowParallelLinear
from tpray.parallel_layers.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from tpray.parallel_layers.utils import divide, set_tensor_model_parallel_attributes

CONFIG = T5Config(
    vocab_size=50, d_model=40, d_kv=6, d_ff=52, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=8, attn_implementation="eager",
)  # fmt: skip


def own_part(weight: Tensor, dim: int) -> Tensor:
    """What a script cuts from a whole weight for this rank."""
    size = divide(weight.shape[dim], parallel_state.get_tensor_model_parallel_size())
    return weight.narrow(dim, size * parallel_state.get_tensor_model_parallel_rank(), size).clone()


class Column(BaseParallelLinear):
    """A layer of the script's own: the rows of a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(own_part(linear.weight.data, 0), requires_grad=False)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1, parallel_state.get_tensor_model_parallel_size())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(copy_to_tensor_model_parallel_region(x), self.weight)


class Row(BaseParallelLinear):
    """A layer of the script's own: the columns of a weight, and the sum."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(own_part(linear.weight.data, 1), requires_grad=False)
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1, parallel_state.get_tensor_model_parallel_size())

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(nn.functional.linear(x, self.weight))


def shard_attention(attention: Any) -> None:
    for name in ("q", "k", "v"):
        linear = getattr(attention, name)
        parallel = ColumnParallelLinear(linear.in_features, linear.out_features, bias=False, gather_output=False)
        parallel.weight.data = own_part(linear.weight.data, 0)
        setattr(attention, name, parallel)
    row = RowParallelLinear(attention.inner_dim, attention.d_model, bias=False, input_is_parallel=True)
    row.weight.data = own_part(attention.o.weight.data, 1)
    attention.o = row
    if attention.has_relative_attention_bias:
        table = own_part(attention.relative_attention_bias.weight.data, 1)  # a column for each head
        attention.relative_attention_bias = nn.Embedding.from_pretrained(table)
    attention.n_heads = divide(attention.n_heads, parallel_state.get_tensor_model_parallel_size())
    attention.inner_dim = attention.n_heads * attention.key_value_proj_dim


class Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask)


def whole() -> Encoder:
    return Encoder(settled(T5EncoderModel(CONFIG)))


def make() -> Encoder:
    encoder = whole()
    for block in encoder.model.encoder.block:
        shard_attention(block.layer[0].SelfAttention)
        dense = block.layer[1].DenseReluDense
        dense.wi_0, dense.wi_1, dense.wo = Column(dense.wi_0), Column(dense.wi_1), Row(dense.wo)
    return encoder


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    return some_ids(50, 2, 9, seed=seed), mask


SCRIPT = Script("t5", make, [inputs(1), inputs(2)], whole, (2, 4))
