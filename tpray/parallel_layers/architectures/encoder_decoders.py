"""Encoder-decoders: the decoder reads the same text again, and the label is read from its last end of sequence."""

from __future__ import annotations

from dataclasses import replace

from tpray.parallel_layers.architectures.common import ONE_TOKEN, REST, SMALL
from tpray.parallel_layers.plan import Cut, Plan, Rule

_END = (
    Rule("classification_head.*", Cut.REPLICATED, ONE_TOKEN),
    Rule("*.layernorm_embedding", Cut.REPLICATED, "a vector"),
    *REST,
)
_LAYERS = (
    Rule("*_attn.[qkv]_proj", Cut.QUERY),
    Rule("*_attn.out_proj", Cut.ATTENTION_OUTPUT),
    Rule("*.fc1", Cut.UP),
    Rule("*.fc2", Cut.DOWN),
)

_BART = Plan(
    (
        *_LAYERS,
        Rule("*.shared", Cut.REPLICATED, SMALL),
        Rule("*.embed_tokens", Cut.REPLICATED, SMALL),
        *_END,
    )
)

_MBART = Plan(
    (
        *_LAYERS,  # a vocabulary of 250,000 is two fifths of the model
        Rule("*.shared", Cut.VOCAB),
        Rule("*.embed_tokens", Cut.VOCAB),
        *_END,
    )
)

_MVP = replace(_BART, local=(("*_attn", ("num_heads", "embed_dim")),))

_BIGBIRD_PEGASUS = replace(
    _MBART,
    rules=(
        Rule("*.self_attn.self.query", Cut.QUERY),
        Rule("*.self_attn.self.key", Cut.QUERY),
        Rule("*.self_attn.self.value", Cut.QUERY),
        Rule("*.encoder.*.self_attn.output", Cut.ATTENTION_OUTPUT),
        *_MBART.rules,
    ),
    local=(("*.self_attn.self", ("num_attention_heads", "all_head_size")),),
)

_T5 = Plan(
    (
        Rule("*Attention.[qkv]", Cut.QUERY),
        Rule("*Attention.o", Cut.ATTENTION_OUTPUT),
        Rule("*.relative_attention_bias", Cut.QUERY),
        Rule("*.wi", Cut.UP),
        Rule("*.wi_[01]", Cut.UP),
        Rule("*.wo", Cut.DOWN),
        Rule("*.shared", Cut.VOCAB),
        Rule("*.embed_tokens", Cut.VOCAB),
        *_END,
    ),
    local=(("*Attention", ("n_heads", "inner_dim")),),
)

ENCODER_DECODERS: dict[str, Plan] = {
    "bart": _BART,
    "mbart": _MBART,
    "plbart": _BART,
    "mvp": _MVP,
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "bigbird_pegasus": _BIGBIRD_PEGASUS,
}
