"""transformers' own model of a checkpoint, unsharded and in float32: what a group's logits are compared with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.parallel_layers.tasks import auto_class


def stock_model(checkpoint: Checkpoint) -> Any:
    """The classifier; of a checkpoint with words the language model, whose answers are the logits of these."""
    make = AutoModelForCausalLM if checkpoint.words else auto_class(checkpoint.config)
    model = make.from_pretrained(
        checkpoint.directory, config=checkpoint.config, dtype=torch.float32, local_files_only=True,
        trust_remote_code=False,
    ).eval()  # fmt: skip
    return NextWord(model, checkpoint.word_ids) if checkpoint.words else model


class NextWord(nn.Module):
    """Of a language model the logits ``[B, L]`` of some words behind each row's last token that is no padding."""

    def __init__(self, model: Any, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.config, self.ids = model, model.config, list(ids)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        made = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).logits
        real = input_ids != self.config.pad_token_id
        last = (real * torch.arange(input_ids.shape[1])).argmax(-1)
        return SimpleNamespace(logits=made[torch.arange(len(made)), last][:, self.ids])
