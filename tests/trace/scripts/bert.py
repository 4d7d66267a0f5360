"""A BERT classifier whose attention was replaced, and whose checkpoint is one file: as in AWS's tutorial."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertSelfAttention, BertSelfOutput

import tpray
from tests.trace.scripts.script import Script, settled, some_ids
from tpray.parallel_layers import layers, parallel_state

CONFIG = BertConfig(
    vocab_size=67, hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=80,
    max_position_embeddings=24, num_labels=3, attn_implementation="eager",
)  # fmt: skip


class ParallelSelfAttention(BertSelfAttention):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = self.all_head_size
        self.query = layers.ColumnParallelLinear(config.hidden_size, width, gather_output=False)
        self.key = layers.ColumnParallelLinear(config.hidden_size, width, gather_output=False)
        self.value = layers.ColumnParallelLinear(config.hidden_size, width, gather_output=False)
        self.num_attention_heads //= parallel_state.get_tensor_model_parallel_size()
        self.all_head_size //= parallel_state.get_tensor_model_parallel_size()


class ParallelSelfOutput(BertSelfOutput):  # type: ignore[misc]  # likewise
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dense = layers.RowParallelLinear(config.hidden_size, config.hidden_size, input_is_parallel=True)


def whole() -> Any:
    return settled(BertForSequenceClassification(CONFIG))


def make() -> tuple[Any, dict[Tensor, int]]:
    model = BertForSequenceClassification(CONFIG)
    for layer in model.bert.encoder.layer:
        layer.attention.self = ParallelSelfAttention(model.config)
        layer.attention.output = ParallelSelfOutput(model.config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bert.pt"
        torch.save({"model": whole().state_dict()}, path)
        tpray.parallel_layers.load(path, model, sharded=False)
    return model, {}


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    return some_ids(67, 2, 11, seed=seed), mask, some_ids(2, 2, 11, seed=seed)


SCRIPT = Script("bert", make, [inputs(1), inputs(2)], whole, (2, 3, 4))
