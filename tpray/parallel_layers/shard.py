"""From a stock transformers classifier to one rank's shard of it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tpray.parallel_layers.checkpoint import Checkpoint, load_shard
from tpray.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from tpray.parallel_layers.plan import Plan, Split, plan_for


class ShardedClassifier(nn.Module):
    """A transformers sequence classifier behind one signature for every architecture.

    ``forward(input_ids, attention_mask, token_type_ids)``, each int64 ``[B, S]`` -> logits float32
    ``[B, L]``. Token types are dropped where the architecture has none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        types: int = getattr(model.config, "type_vocab_size", 0)
        self.takes_token_types = "token_type_ids" in accepted and types > 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        extra = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        logits: Tensor = output.logits
        return logits.float()


def build_shard(checkpoint: Checkpoint, dtype: torch.dtype) -> ShardedClassifier:
    """This rank's shard (see `parallel_state`), its weights read from ``checkpoint``.

    The whole model never exists here: it is built on the meta device, its layers are replaced by the plan,
    and each rank then reads its own slices.

    Raises:
        UnsupportedModelError, DegreeError, CheckpointError: see `plan` and `checkpoint`.
    """
    from transformers import AutoModelForSequenceClassification

    checkpoint.check_classifier()
    plan = plan_for(checkpoint.config.model_type)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(checkpoint.config, attn_implementation="sdpa")
    model.eval()
    apply_plan(model, plan, dtype)
    _restore_buffers(model)
    load_shard(model, checkpoint, dtype)
    return ShardedClassifier(model).eval()


def apply_plan(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Replace in place, in a model on the meta device, every layer that ``plan`` splits."""
    for path, module in list(model.named_modules()):
        if any(True for _ in module.children()) or not list(module.parameters(recurse=False)):
            continue
        split = plan.split_of(path)
        if split is not Split.REPLICATED:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _parallel(module, split, dtype))


def _parallel(module: Any, split: Split, dtype: torch.dtype) -> nn.Module:
    if split is Split.VOCAB:
        return ParallelEmbedding(module.num_embeddings, module.embedding_dim, dtype=dtype, device="meta")
    sizes = module.in_features, module.out_features, module.bias is not None
    if split is Split.COLUMN:
        return ColumnParallelLinear(*sizes, gather_output=False, dtype=dtype, device="meta")
    return RowParallelLinear(*sizes, input_is_parallel=True, dtype=dtype, device="meta")


def _restore_buffers(model: Any) -> None:
    """Give buffers that no checkpoint holds (position ids) the values that transformers initialises."""
    for path, buffer in list(model.named_non_persistent_buffers()):
        if buffer.is_meta:
            parent_path, _, leaf = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            parent._buffers[leaf] = torch.empty_like(buffer, device="cpu")
            model._init_weights(parent)  # its parameters are still on the meta device: untouched
