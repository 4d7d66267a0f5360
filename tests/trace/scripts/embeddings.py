"""Embeddings shared out both ways, gathered outputs, and a vocabulary's logits; the output is a dict."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.trace.scripts.script import Script, settled, some_ids
from tpray.parallel_layers import load
from tpray.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding

VOCABULARY, WIDTH = 31, 10


class Model(nn.Module):
    def __init__(self, words: Any, places: Any, first: Any, head: Any) -> None:
        super().__init__()
        self.words, self.places, self.first, self.head = words, places, first, head

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        hidden = torch.tanh(self.first(x))
        return {"hidden": hidden, "logits": self.head(hidden)}


def whole() -> nn.Module:
    words, places = nn.Embedding(VOCABULARY, WIDTH, max_norm=0.9), nn.Embedding(12, WIDTH)
    model = settled(Model(words, places, nn.Linear(WIDTH, 14), nn.Linear(14, VOCABULARY)))
    return model.requires_grad_(False)  # max_norm changes the weight in place


def make() -> nn.Module:
    words = ParallelEmbedding(VOCABULARY, WIDTH, max_norm=0.9, pad=True)
    places = ParallelEmbedding(12, WIDTH, shard_across_embedding=True, pad=True)
    head = ColumnParallelLinear(14, VOCABULARY, pad=True)
    model = Model(words, places, ColumnParallelLinear(WIDTH, 14, pad=True), head)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save({"model": whole().state_dict()}, path)
        load(str(path), model, sharded=False)
    return model


CALLS = [(some_ids(VOCABULARY, 2, 9, seed=1),), (some_ids(VOCABULARY, 2, 9, seed=2),)]
SCRIPT = Script("embeddings", make, CALLS, whole, (2, 3))
