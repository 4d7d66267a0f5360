"""Which graphs are packed: those that give each row what it gives alone, whatever lies beside it, and no others.

Small models of one attention each do something with tokens, places, sizes or masks. What is packed is compared with the
model on each row alone; what a packed graph could not know must be refused, and is then padded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import rows
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.plan import Plan
from tpray.platforms.topology import Topology
from tpray.runtime.base import SavedShard
from tpray.runtime.cpu.lowered import graph_file
from tpray.runtime.cpu.runtime import CpuRuntime

WIDTH = 16
LONGEST = 64
Mix = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the model, tokens ``[B, S, H]``, ids, attention mask and types ``[B, S]``."""


def padding(mask: Tensor) -> Tensor:
    return (mask != 0)[:, None, None, :]


def attended(x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    heads = x.view(x.shape[0], x.shape[1], 2, WIDTH // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, mask, **options).transpose(1, 2).reshape(x.shape)


def plainly(model: Model, x: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    return attended(x, padding(mask))


def first(model: Model, x: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    return x[:, 0]


def last_of(ids: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1]) * (ids != 0)).argmax(-1)


def apart(ids: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1])
    return places[:, None] - places[None, :]


class Model(nn.Module):
    """Embeddings, ``mix``, ``pool`` and a linear head."""

    def __init__(self, mix: Mix, pool: Mix) -> None:
        super().__init__()
        self.words, self.kinds, self.places = nn.Embedding(50, WIDTH), nn.Embedding(2, WIDTH), nn.Embedding(64, WIDTH)
        self.head, self.gate = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)
        self.vector, self.scale = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.table = nn.Parameter(torch.randn(1, 64, WIDTH))
        self.keys = nn.Parameter(torch.randn(1, 2, 4, WIDTH // 2))
        self.mix, self.pool = mix, pool

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        x = self.mix(self, self.words(ids) + self.kinds(types), ids, mask, types)
        logits: Tensor = self.head(self.pool(self, x, ids, mask, types))
        return logits


def masked(mask_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Mix:
    """Attention with a mask of ids, attention mask and types."""
    return lambda model, x, ids, mask, types: attended(x, mask_of(ids, mask, types))


def with_places(places_of: Callable[[Tensor], Tensor]) -> Mix:
    """Attention behind embeddings of places, of ids."""
    return lambda model, x, ids, mask, types: attended(x + model.places(places_of(ids)), padding(mask))


def after(change: Callable[[Model, Tensor, Tensor], Tensor]) -> Mix:
    """Attention behind a change of the tokens, of the model, tokens and ids."""
    return lambda model, x, ids, mask, types: attended(change(model, x, ids), padding(mask))


def learned_keys(model: Model, x: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    q = x.view(*ids.shape, 2, WIDTH // 2).transpose(1, 2)
    keys = model.keys.expand(ids.shape[0], -1, -1, -1)
    return x + F.scaled_dot_product_attention(q, keys, keys).transpose(1, 2).reshape(x.shape)


def first_asks(model: Model, x: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    x = plainly(model, x, ids, mask, types)
    query, keys = x[:, 0].unsqueeze(1).unsqueeze(1), x.unsqueeze(1)
    return F.scaled_dot_product_attention(query, keys, keys, padding(mask)).squeeze(1)


def several(model: Model, x: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    distance = apart(ids)
    for seen in (distance >= 0, distance.abs() <= 3, distance.abs() >= 0):
        x = attended(x, padding(mask) & seen)
    return x


def chunks(ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    chunk = torch.arange(ids.shape[1]) // 7
    return padding(mask) & (chunk == chunk[:, None])


PACKED: dict[str, tuple[Mix, Mix]] = {
    "no mask": (lambda model, x, ids, mask, types: attended(x, None), first),
    "places": (with_places(lambda ids: torch.arange(ids.shape[1])), first),
    "a running sum of ids": (with_places(lambda ids: (ids != 0).long().cumsum(1) - 1), first),
    "several masks": (several, first),
    "a running sum of features": (after(lambda model, x, ids: x.cumsum(-1)), first),
    "the last token": (plainly, lambda model, x, ids, mask, types: x[torch.arange(ids.shape[0]), last_of(ids)]),
    "the token of the largest id": (
        plainly, lambda model, x, ids, mask, types: x[torch.arange(ids.shape[0]), ids.argmax(-1)]
    ),
    "first and last": (
        plainly, lambda model, x, ids, mask, types: x[:, 0] * x[torch.arange(ids.shape[0]), last_of(ids)]
    ),
    "a mean": (
        plainly, lambda model, x, ids, mask, types: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    ),
    "a scale of features": (lambda *given: plainly(*given) * given[0].scale + given[0].scale, first),
    "a gate of each token": (after(lambda model, x, ids: x * model.gate(x).sigmoid()), first),
}  # fmt: skip

PADDED: dict[str, tuple[Mix, Mix]] = {
    "a mask of ids": (masked(lambda ids, mask, types: padding(mask) & (ids != 5)[:, None, None, :]), first),
    "a mask of types": (
        masked(lambda ids, mask, types: padding(mask) & (types[:, None, None, :] == types[:, None, :, None])), first
    ),
    "a window by tril and triu": (
        masked(lambda ids, mask, types: padding(mask) & torch.ones_like(apart(ids)).bool().tril(20).triu(-20)), first
    ),
    "a window by a running sum of the mask": (
        masked(
            lambda ids, mask, types: padding(mask)
            & ((mask.cumsum(1)[:, :, None] - mask.cumsum(1)[:, None]).abs() <= 20)[:, None]
        ),
        first,
    ),
    "a window that grows": (
        masked(lambda ids, mask, types: padding(mask) & (apart(ids).abs() <= ids.shape[1] // 4)), first
    ),
    "one place is hidden": (
        masked(lambda ids, mask, types: padding(mask) & ((torch.arange(ids.shape[1]) != 37) | (apart(ids) == 0))), first
    ),
    "chunks": (masked(chunks), first),
    "a bias of distances": (masked(lambda ids, mask, types: padding(mask).float().log() - apart(ids).abs()), first),
    "causal without a mask": (lambda model, x, ids, mask, types: attended(x, None, is_causal=True), first),
    "sizes as factors": (after(lambda model, x, ids: x * ids.shape[1]), first),
    "sizes as values": (after(lambda model, x, ids: x + torch.full((1,), ids.shape[1])), first),
    "places from the end": (with_places(lambda ids: ids.shape[1] - 1 - torch.arange(ids.shape[1])), first),
    "rows divided by sizes": (plainly, lambda model, x, ids, mask, types: x[:, 0] / ids.shape[1]),
    "rows by the batch's size": (
        plainly, lambda model, x, ids, mask, types: x[:, 0].view(ids.shape[0], 4, -1).flatten(1)
    ),
    "spread places": (with_places(lambda ids: torch.arange(0, ids.shape[1])[None].expand(ids.shape[0], -1)), first),
    "repeated places": (with_places(lambda ids: torch.arange(0, ids.shape[1])[None].repeat(ids.shape[0], 1)), first),
    "a parameter of places": (
        after(lambda model, x, ids: x + model.table[:, : ids.shape[1]].expand(ids.shape[0], -1, -1)), first
    ),
    "a running sum of floats": (after(lambda model, x, ids: x + x[..., 0].cumsum(1)[..., None] * 0.1), first),
    "a softmax over tokens": (after(lambda model, x, ids: x * (x @ model.vector).softmax(-1)[..., None]), first),
    "a softmax over tokens of one feature": (after(lambda model, x, ids: x * model.gate(x).softmax(1)), first),
    "turned around": (after(lambda model, x, ids: x.flip(1)), first),
    "shifted": (after(lambda model, x, ids: x + x.roll(1, 1)), first),
    "less the mean": (after(lambda model, x, ids: x - x.mean(1, keepdim=True)), first),
    "learned keys": (learned_keys, first),
    "the first token asks": (first_asks, first),
    "the last place as a number": (
        plainly,
        lambda model, x, ids, mask, types: x[torch.arange(ids.shape[0]), last_of(ids)] + last_of(ids)[:, None] * 0.1,
    ),
    "the token before the last": (
        plainly, lambda model, x, ids, mask, types: x[torch.arange(ids.shape[0]), (last_of(ids) - 1).clamp(min=0)]
    ),
    "the token of the largest feature": (
        plainly, lambda model, x, ids, mask, types: x[torch.arange(ids.shape[0]), x[..., 0].argmax(1)]
    ),
    "the largest": (plainly, lambda model, x, ids, mask, types: x.max(1)[0]),
    "a mean of padding too": (plainly, lambda model, x, ids, mask, types: x.mean(1)),
}  # fmt: skip


def traced(model: Model, folder: Path) -> tuple[Any, bool]:
    """The model's program, and whether that packs rows."""
    with parallel_state.use(0, 1):
        CpuRuntime(Topology(1)).trace(model.eval(), LONGEST, folder, ())
    program = CpuRuntime(Topology(1)).load(SavedShard(folder, 0, 1, "float32", (), Plan(())))
    return program, (folder / graph_file(1)).exists()


@pytest.mark.parametrize("name", PACKED)
def test_each_row_gets_what_it_gets_alone(name: str, tmp_path: Path) -> None:
    """One of them is not finite, and stays so; the others do not see it."""
    torch.manual_seed(0)
    model = Model(*PACKED[name])
    ids, mask, types = (torch.from_numpy(x) for x in rows([1, 64, 64, 9, 63, 2], 0))
    batch = [torch.where(mask > 0, 1 + ids % 47, 0), mask, types]
    batch[0][3, :9] = 49
    with torch.no_grad():
        model.words.weight[49] = torch.nan
        program, packs = traced(model, tmp_path)
        assert packs
        alone = [model(*(x[i : i + 1, :length] for x in batch)) for i, length in enumerate(mask.sum(1))]
    expected = torch.cat(alone)
    assert expected.isnan().any(1).tolist() == [False, False, False, True, False, False]
    torch.testing.assert_close(program(*batch)[0], expected, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", PADDED)
def test_what_a_packed_row_could_not_know_is_padded(name: str, tmp_path: Path) -> None:
    _, packs = traced(Model(*PADDED[name]), tmp_path)
    assert not packs
