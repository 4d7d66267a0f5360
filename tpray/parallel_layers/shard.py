"""From a stock transformers classifier to one rank's shard of it."""

from __future__ import annotations

import inspect
import sys
from copy import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpray.errors import ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.parallel_layers.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    Partition,
    RowParallelLinear,
    mark_sharded,
    partition_of,
)
from tpray.parallel_layers.loading import load_shard, stream_weights
from tpray.parallel_layers.norm import SplitNorm
from tpray.parallel_layers.partition import take
from tpray.parallel_layers.plan import Cut, Plan, Rule, Share, Split, Unit
from tpray.parallel_layers.stock import empty_model, paths_to_decide, scale_of


class ShardedClassifier(nn.Module):
    """A transformers classifier behind one signature for every architecture.

    ``forward(input_ids, attention_mask, token_type_ids)``, each int64 ``[B, S]`` -> logits float32
    ``[B, L]``; of a classifier of tokens ``[B, S, L]``, zeros where padding is. Token types are dropped where
    transformers would not give the model any.

    Args:
        typed: whether the tokenizer gives token types; see `tpray.tokenizer.takes_types`.
    """

    def __init__(self, model: nn.Module, typed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.takes_token_types = count_token_types(model, typed) > 1
        self.keeps_a_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        model: Any = self.model
        if model.config.is_encoder_decoder and hasattr(model, "classification_head"):  # T5's of tokens has no decoder
            return self._read_end(input_ids, attention_mask).float()
        extra: dict[str, Any] = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        if self.keeps_a_cache:
            extra["use_cache"] = False
        output = model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        logits: Tensor = output.logits
        if logits.dim() == 3:
            logits = logits.masked_fill(attention_mask.eq(0).unsqueeze(-1), 0.0)
        return logits.float()

    def _read_end(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head of an encoder-decoder reads in each row's last end of sequence; NaN for a row without one.

        transformers' own forward does the same, for rows that all have as many: one text that contains the token
        would be an error of all that are computed with it.
        """
        model: Any = self.model
        hidden = model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=_shift_right(model, input_ids),
            use_cache=False,
        )[0]
        ends = input_ids.eq(model.config.eos_token_id) & attention_mask.bool()
        last = (ends * torch.arange(ends.shape[1], device=ends.device)).argmax(dim=1)
        logits: Tensor = model.classification_head(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        return torch.where(ends.any(dim=1, keepdim=True), logits, torch.nan)


def _shift_right(model: Any, input_ids: Tensor) -> Tensor:
    """What transformers' decoder reads of ``[B, S]`` ids, ``[B, S]``: a start, and all but the last.

    Shifted are S + 1: of S - 1 tokens, which may be one, a trace would remember that they are more.
    """
    config = model.config
    longer = nn.functional.pad(input_ids, (0, 1), value=config.pad_token_id)
    if hasattr(model, "_shift_right"):  # T5's
        shifted: Tensor = model._shift_right(longer)
    else:
        shift = sys.modules[type(model).__module__].shift_tokens_right
        _, *settings = inspect.signature(shift).parameters
        shifted = shift(longer, **{name: getattr(config, name) for name in settings})
    return shifted[:, : input_ids.shape[1]]


def count_token_types(model: nn.Module, typed: bool) -> int:
    """How many token types a model has embeddings for; 0: it takes none.

    Some models (GPT-2, XLM) have no table for them and look them up among the words, if they are given any at all:
    zeros, which mean nothing elsewhere, would be a word there.
    """
    config: Any = model.config
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return 0
    if hasattr(config, "type_vocab_size"):
        return int(config.type_vocab_size or 0)
    return int(config.vocab_size) if typed else 0


def build_shard(
    checkpoint: Checkpoint, dtype: torch.dtype, attention: str = "sdpa", typed: bool = False
) -> ShardedClassifier:
    """This rank's shard (see `parallel_state`), its weights read from ``checkpoint``. typed: see `ShardedClassifier`.

    The whole model never exists here: it is built on the meta device, its layers are replaced by the plan,
    and each rank then reads its own slices.

    Raises:
        UnsupportedModelError, DegreeError, CheckpointError: see `plan` and `checkpoint`.
    """
    checkpoint.check_classifier()
    model = empty_model(checkpoint.config, attention)
    apply_plan(model, checkpoint.plan, dtype)
    _restore_buffers(model)
    load_shard(model, checkpoint, dtype)
    _add_spare_position(model, checkpoint.plan)
    return ShardedClassifier(model, typed).eval()


def streamed_model(checkpoint: Checkpoint) -> Any:
    """The stock classifier, unsharded and in float32, whose layers read their weights when they compute."""
    model = empty_model(checkpoint.config)
    _restore_buffers(model)
    stream_weights(model, checkpoint)
    return model


@dataclass(frozen=True)
class Decision:
    """What the plan says of one layer. path: of the layer; of the parameter, if its module has layers of its own."""

    path: str
    rule: Rule


def decide(model: nn.Module, plan: Plan) -> list[Decision]:
    """The rule for every layer that has parameters.

    Raises:
        UnsupportedModelError: a layer that no rule mentions.
    """
    return [Decision(path, plan.rule_for(path)) for path in paths_to_decide(model)]


def check_plan(checkpoint: Checkpoint) -> None:
    """Refuse a plan that does not fit the model, before any weight is read.

    Raises:
        UnsupportedModelError: a layer that no rule mentions.
        ConfigError: a rule that decides on no layer.
    """
    model, plan = empty_model(checkpoint.config), checkpoint.plan
    used = {decision.rule for decision in decide(model, plan)}
    idle = [rule.pattern for rule in plan.rules if rule not in used]
    modules = [path for path, _ in model.named_modules()]
    named = [pattern for pattern, _ in plan.local + plan.head_inputs + plan.spare_position]
    idle += [pattern for pattern in named if not any(fnmatchcase(path, pattern) for path in modules)]
    if idle:
        layers = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise ConfigError(
            f"the sharding plan's pattern {idle[0]!r} matches no layer that an earlier rule has left over; the linear "
            f"layers of {checkpoint.source} are {layers[:400]}"
        )


def apply_plan(model: Any, plan: Plan, dtype: torch.dtype) -> None:
    """Replace in place, in a model on the meta device, every layer that ``plan`` splits.

    Raises:
        UnsupportedModelError: a layer that no rule mentions.
        DegreeError: a rank would be left without an attention head.
    """
    state = parallel_state.current()
    plan.check_degree(model.config, state.size)
    share = plan.share(model.config, state.rank, state.size)
    for decision in decide(model, plan):
        cut = decision.rule.cut
        if cut is Cut.REPLICATED:
            continue
        parent_path, _, leaf = decision.path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if leaf in parent._parameters:
            _slice_parameter(parent, leaf, 0, cut, share)
        else:
            setattr(parent, leaf, _parallel(getattr(parent, leaf), cut, share, dtype))
    if plan.shards_heads():
        _count_own_heads(model, plan, share)


def _parallel(module: Any, cut: Cut, share: Share, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding) and cut.split is Split.VOCAB:
        bounds = share.bounds(cut, module.num_embeddings)
        sizes = module.num_embeddings, module.embedding_dim
        scale = scale_of(module)
        if scale in (None, 1.0):
            return ParallelEmbedding(*sizes, dtype=dtype, device="meta", bounds=bounds)
        scaled = _ScaledEmbedding(*sizes, dtype=dtype, device="meta", bounds=bounds)
        scaled.scale = torch.tensor(scale, dtype=dtype).item()
        return scaled
    if cut.split is Split.NORM:
        shared = cut.unit is Unit.KEY_VALUE_HEAD
        return SplitNorm(module, share.bounds(cut, len(module.weight)), share.holders if shared else 1, dtype)
    if not isinstance(module, (nn.Linear, Conv1D)):
        for name, parameter in list(module.named_parameters(recurse=False)):
            _slice_parameter(module, name, parameter.dim() - 1 if isinstance(module, nn.Embedding) else 0, cut, share)
        kept: nn.Module = module
        return kept
    transposed = isinstance(module, Conv1D)  # GPT-2's linear layer, whose weight is [I, O]
    outputs, inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    options: dict[str, Any] = {"bias": module.bias is not None, "dtype": dtype, "device": "meta"}
    layer: ColumnParallelLinear | RowParallelLinear
    if cut.split is Split.COLUMN:
        bounds = share.bounds(cut, outputs)
        layer = ColumnParallelLinear(inputs, outputs, gather_output=False, bounds=bounds, **options)
    else:
        bounds = share.bounds(cut, inputs)
        layer = RowParallelLinear(inputs, outputs, input_is_parallel=True, bounds=bounds, **options)
    part = partition_of(layer.weight)
    if transposed and part is not None:
        mark_sharded(layer.weight, replace(part, transposed=True))
    return layer


class _ScaledEmbedding(ParallelEmbedding):
    """Gemma's and BART's: what is looked up is multiplied by a number, rounded to the weight's dtype first."""

    scale: float = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def _slice_parameter(module: nn.Module, name: str, dim: int, cut: Cut, share: Share) -> None:
    whole = module.get_parameter(name)
    part = Partition(dim, whole.shape[dim], share.bounds(cut, whole.shape[dim]))
    shape = list(whole.shape)
    shape[dim] = part.own
    parameter = nn.Parameter(whole.new_empty(shape), requires_grad=False)
    mark_sharded(parameter, part)
    module._parameters[name] = parameter


def _count_own_heads(model: nn.Module, plan: Plan, share: Share) -> None:
    for path, module in model.named_modules():
        for pattern, names in plan.local:
            if fnmatchcase(path, pattern):
                _set_own(module, names, share)
        for pattern, names in plan.head_inputs:
            if fnmatchcase(path, pattern):
                module.register_forward_pre_hook(_GivesOwnHeads(names, share), with_kwargs=True)
        if hasattr(module, "num_key_value_groups"):  # how often a key/value head is repeated for its query heads
            own, shared = (stop - start for start, stop in (share.heads, share.key_value_heads))
            module.num_key_value_groups = own // shared


def _add_spare_position(model: nn.Module, plan: Plan) -> None:
    longest = plan.max_length(model.config) if plan.spare_position else 0
    for path, module in model.named_modules():
        for name in (name for pattern, names in plan.spare_position if fnmatchcase(path, pattern) for name in names):
            if name in module._buffers:
                buffer = module.get_buffer(name)
                ends = [end for size in reversed(buffer.shape) for end in (0, int(size == longest))]
                module._buffers[name] = F.pad(buffer, ends)
            else:
                module.config = copy(module.config)
                setattr(module.config, name.removeprefix("config."), longest + 1)


def _set_own(module: Any, names: tuple[str, ...], share: Share) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        if owner and owner in module.__dict__:
            setattr(module, owner, copy(getattr(module, owner)))  # the other modules' counts all heads
        holder = getattr(module, owner) if owner in module.__dict__ else module
        if attribute in holder.__dict__:  # the pattern may match its layers too
            key_value = "kv" in attribute or "key_value" in attribute
            setattr(holder, attribute, share.scaled(getattr(holder, attribute), key_value))


@dataclass(frozen=True)
class _GivesOwnHeads:
    """Before a module runs: of these arguments, float ``[..., N, Q, K]`` or ``[B * N, Q, K]``, this rank's own heads.

    N heads, Q and K positions of queries and keys. One that is the same for all heads, ``[B, 1, Q, K]``, stays.
    """

    names: tuple[str, ...]
    share: Share

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = {name: self._own(kwargs[name]) for name in self.names if isinstance(kwargs.get(name), Tensor)}
        return args, kwargs | own

    def _own(self, x: Tensor) -> Tensor:
        every = self.share.all_heads
        if x.dim() == 4 and x.shape[1] != every:
            return x
        part = Partition(1, every, (self.share.heads,), even=False)
        if x.dim() == 4:
            return take(x, 1, part)
        return take(x.unflatten(0, (-1, every)), 1, part).flatten(0, 1)


def _restore_buffers(model: Any) -> None:
    """Give buffers that a checkpoint may lack (position ids, rotary frequencies) what transformers initialises."""
    for path, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            parent_path, _, leaf = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            parent._buffers[leaf] = torch.empty_like(buffer, device="cpu")
            model._init_weights(parent)  # its parameters are still on the meta device: untouched
