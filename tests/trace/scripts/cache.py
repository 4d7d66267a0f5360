"""A decoder layer with a key/value cache in io_aliases: a token in, attention over all so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.trace.scripts.script import Script, noise, settled
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
from tpray.trace.trace import get_sharded_checkpoint

HEADS, HEAD, LENGTH = 4, 6, 5
WIDTH = HEADS * HEAD


class Decoder(nn.Module):
    keys: Tensor
    values: Tensor

    def __init__(self, heads: int, qkv: Any, out: Any) -> None:
        super().__init__()
        self.qkv, self.out = qkv, out
        self.keys = nn.Parameter(torch.zeros(1, heads, LENGTH, HEAD), requires_grad=False)
        self.register_buffer("values", torch.zeros(1, heads, LENGTH, HEAD), persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> dict[str, Any]:
        q, k, v = (part.view(1, 1, -1, HEAD).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        places = torch.arange(LENGTH)
        keys = torch.where((places == position)[:, None], k, self.keys)
        values = torch.where((places == position)[:, None], v, self.values)
        scores = q @ keys.transpose(-1, -2) / HEAD**0.5
        weights = torch.softmax(scores.masked_fill(places > position, -1e9), -1)
        return {"cache": (keys, values), "y": self.out((weights @ values).transpose(1, 2).reshape(1, 1, -1))}


def whole() -> Decoder:
    model = settled(Decoder(HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)))
    assert isinstance(model, Decoder)
    model.keys.data.zero_()
    return model


def reference() -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    model = whole()

    def step(x: Tensor, position: Tensor) -> dict[str, Tensor]:
        made = model(x, position)
        model.keys.data, model.values = made["cache"]
        return {"y": made["y"]}

    return step


def make() -> tuple[nn.Module, dict[Tensor, int]]:
    state = parallel_state.current()
    model = Decoder(
        HEADS // state.size,
        ColumnParallelLinear(WIDTH, 3 * WIDTH, gather_output=False, stride=3),
        RowParallelLinear(WIDTH, WIDTH, input_is_parallel=True),
    )
    checkpoint = {name: tensor for name, tensor in whole().state_dict().items() if name != "keys"}
    get_sharded_checkpoint(checkpoint, model, state.rank, state.size)
    model.load_state_dict(checkpoint, strict=False)
    return model, {model.keys: 0, model.values: 1}


CALLS = [(noise(1, 1, WIDTH, seed=i), torch.tensor(i)) for i in range(LENGTH)]
SCRIPT = Script("cache", make, CALLS, reference, (2, 4))
