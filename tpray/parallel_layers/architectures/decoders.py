"""Decoders: a token sees those before it, and the label is read from a row's last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from tpray.parallel_layers.architectures.common import REST, SMALL
from tpray.parallel_layers.plan import Cut, Plan, Rule

_FEED_FORWARD = (
    Rule("*.mlp.gate_proj", Cut.UP),
    Rule("*.mlp.up_proj", Cut.UP),
    Rule("*.mlp.down_proj", Cut.DOWN),
)
_DECODER = Plan(
    (
        Rule("*.self_attn.q_proj", Cut.QUERY),
        Rule("*.self_attn.[kv]_proj", Cut.KEY_VALUE),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        *_FEED_FORWARD,
        Rule("*.embed_tokens", Cut.VOCAB),
        *REST,
    ),
    reads_last_token=True,
)

_GPT2_REST = (
    Rule("*.mlp.c_fc", Cut.UP),
    Rule("*.mlp.c_proj", Cut.DOWN),
    Rule("*.wte", Cut.VOCAB),
    Rule("*.wpe", Cut.REPLICATED, SMALL),
    Rule("*.ln_*", Cut.REPLICATED, "a vector"),
    *REST,
)
_GPT2 = Plan(
    (
        Rule("*.attn.c_attn", Cut.QKV),
        Rule("*.attn.c_proj", Cut.ATTENTION_OUTPUT),
        *_GPT2_REST,
    ),
    local=(("*.attn", ("num_heads", "split_size")),),
    reads_last_token=True,
)

_GPT_BIGCODE = replace(
    _GPT2,  # one key and value for all query heads
    local=(("*.attn", ("num_heads", "embed_dim", "kv_heads", "kv_dim")),),
)
_GPT_BIGCODE_MANY = replace(_GPT_BIGCODE, rules=(Rule("*.attn.c_attn", Cut.QUERY), *_GPT_BIGCODE.rules))

_OPENAI = Plan(
    (
        Rule("*.attn.c_attn", Cut.QKV),
        Rule("*.attn.c_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.tokens_embed", Cut.VOCAB),
        Rule("*.positions_embed", Cut.REPLICATED, SMALL),
        *_GPT2_REST,
    ),
    local=(("*.attn", ("n_head", "split_size")),),
    spare_position=(("*.attn", ("bias",)), ("transformer", ("position_ids",))),
    reads_last_token=True,
)

_GPT_NEO = Plan(
    (
        Rule("*.attn.attention.[qkv]_proj", Cut.QUERY),
        Rule("*.attn.attention.out_proj", Cut.ATTENTION_OUTPUT),
        *_GPT2_REST,
    ),
    local=(("*.attn.attention", ("num_heads",)),),
    spare_position=(("*.attn.attention", ("bias",)),),
    reads_last_token=True,
)

_GPTJ = Plan(
    (
        Rule("*.attn.[qkv]_proj", Cut.QUERY),
        Rule("*.attn.out_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.fc_in", Cut.UP),
        Rule("*.mlp.fc_out", Cut.DOWN),
        *_GPT2_REST,
    ),
    local=(("*.attn", ("num_attention_heads",)),),
    reads_last_token=True,
)

_NEOX_FEED_FORWARD = (
    Rule("*.mlp.dense_h_to_4h", Cut.UP),
    Rule("*.mlp.dense_4h_to_h", Cut.DOWN),
)
_GPT_NEOX = Plan(
    (
        Rule("*.attention.query_key_value", Cut.QUERY),
        Rule("*.attention.dense", Cut.ATTENTION_OUTPUT),
        *_NEOX_FEED_FORWARD,
        Rule("*.embed_in", Cut.VOCAB),
        *REST,
    ),
    reads_last_token=True,
)

_PERSIMMON = Plan(
    (
        Rule("*.self_attn.query_key_value", Cut.QUERY),
        Rule("*.self_attn.dense", Cut.ATTENTION_OUTPUT),
        *_NEOX_FEED_FORWARD,
        Rule("*.embed_tokens", Cut.VOCAB),
        *REST,
    ),
    local=(("*.self_attn", ("num_heads",)),),
    reads_last_token=True,
)

_BLOOM_REST = (
    Rule("*.self_attention.dense", Cut.ATTENTION_OUTPUT),
    *_NEOX_FEED_FORWARD,
    Rule("*.word_embeddings", Cut.VOCAB),
    Rule("*.ln_*", Cut.REPLICATED, "a vector"),
    *REST,
)
_BLOOM = Plan(
    (Rule("*.self_attention.query_key_value", Cut.QUERY), *_BLOOM_REST),
    local=(("*.self_attention", ("num_heads",)),),
    head_inputs=(("*.self_attention", ("alibi",)),),
    reads_last_token=True,
)

_FALCON = Plan(
    (Rule("*.self_attention.query_key_value", Cut.QKV), *_BLOOM_REST),
    local=(("*.self_attention", ("num_heads", "num_kv_heads")),),
    head_inputs=(("*.self_attention", ("alibi", "attention_mask")),),
    key_value_heads=1,
    reads_last_token=True,
)
_FALCON_NEW = replace(
    _FALCON,
    rules=(Rule("*.self_attention.query_key_value", Cut.QKV_GROUPS), *_BLOOM_REST),
    key_value_heads="num_kv_heads",
)
_FALCON_MANY = replace(
    _FALCON,
    rules=(Rule("*.self_attention.query_key_value", Cut.QUERY), *_BLOOM_REST),
    key_value_heads="num_attention_heads",
)

_MPT = Plan(
    (
        Rule("*.attn.Wqkv", Cut.QKV),
        Rule("*.attn.out_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.ffn.up_proj", Cut.UP),
        Rule("*.ffn.down_proj", Cut.DOWN),
        Rule("*.wte", Cut.VOCAB),
        Rule("*.norm_*", Cut.REPLICATED, "a vector"),
        *REST,
    ),
    local=(("*.attn", ("n_heads",)),),
    head_inputs=(("*.attn", ("position_bias",)),),
    spare_position=(("transformer", ("config.max_seq_len",)),),
    reads_last_token=True,
)

_OPT = Plan(
    (
        Rule("*.self_attn.[qkv]_proj", Cut.QUERY),
        Rule("*.self_attn.out_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.layers.*.fc1", Cut.UP),
        Rule("*.layers.*.fc2", Cut.DOWN),
        Rule("*.embed_tokens", Cut.VOCAB),
        Rule("*.project_*", Cut.REPLICATED, SMALL),
        *REST,
    ),
    local=(("*.self_attn", ("num_heads", "embed_dim")),),
    reads_last_token=True,
)

_CTRL = Plan(
    (
        Rule("*.multi_head_attention.W[qkv]", Cut.QUERY),
        Rule("*.multi_head_attention.dense", Cut.ATTENTION_OUTPUT),
        Rule("*.ffn.0", Cut.UP),
        Rule("*.ffn.2", Cut.DOWN),
        Rule("transformer.w", Cut.VOCAB),
        Rule("*layernorm*", Cut.REPLICATED, "a vector"),
        *REST,
    ),
    reads_last_token=True,
)

_PHI3 = Plan(
    (
        Rule("*.self_attn.qkv_proj", Cut.QKV),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.gate_up_proj", Cut.GATE_UP),
        Rule("*.mlp.down_proj", Cut.DOWN),
        Rule("*.embed_tokens", Cut.VOCAB),
        *REST,
    ),
    local=(("*.self_attn", ("config.num_attention_heads", "num_key_value_heads")),),
    reads_last_token=True,
)

_STABLELM = replace(_DECODER, local=(("*.self_attn", ("num_heads", "num_key_value_heads")),))

_MINICPM3 = Plan(
    (
        Rule("*.self_attn.q_proj", Cut.QUERY),
        Rule("*.self_attn.q_b_proj", Cut.QUERY),
        Rule("*.self_attn.kv_b_proj", Cut.QUERY),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.self_attn.*_a_*", Cut.REPLICATED, "its few features are of all heads"),
        *_FEED_FORWARD,
        Rule("*.embed_tokens", Cut.VOCAB),
        *REST,
    ),
    local=(("*.self_attn", ("num_heads",)),),
    key_value_heads="num_attention_heads",
    reads_last_token=True,
)

_MODERNBERT_DECODER = Plan(
    (
        Rule("*.attn.[qkv]_proj", Cut.QUERY),
        Rule("*.attn.Wo", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.Wi", Cut.GATE_UP),
        Rule("*.mlp.Wo", Cut.DOWN),
        Rule("*.tok_embeddings", Cut.VOCAB),
        Rule("head.*", Cut.REPLICATED, SMALL),
        *REST,
    ),
    reads_last_token=True,
)


def _whole_attention(why: str, *rules: Rule) -> Plan:
    """Only the feed-forward and the vocabulary are cut."""
    attention = Rule("*.self_attn.*", Cut.REPLICATED, why)
    return Plan(
        (attention, *_FEED_FORWARD, Rule("*.embed_tokens", Cut.VOCAB), *rules, *REST),
        reads_last_token=True,
    )


_DIFFLLAMA = _whole_attention("a head's partner, which it is subtracted from, is half of all heads away")
_DOGE = _whole_attention(
    "each head's mask is made of all heads' values", Rule("*_residual", Cut.REPLICATED, "a vector")
)
_STABLELM_NORMED = _whole_attention("each head has norms of its own")

DECODERS: dict[str, Plan] = {
    "gpt2": _GPT2,
    "gpt-sw3": _GPT2,
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "hunyuan_v1_dense": _DECODER,
    "phi3": _PHI3,
    "gpt_neox": _GPT_NEOX,
    "stablelm": _STABLELM,
    "falcon": _FALCON,
    "bloom": _BLOOM,
    "opt": _OPT,
    "biogpt": _OPT,
    "gpt_neo": _GPT_NEO,
    "gptj": _GPTJ,
    "gpt_bigcode": _GPT_BIGCODE,
    "mpt": _MPT,
    "persimmon": _PERSIMMON,
    "minicpm3": _MINICPM3,
    "openai-gpt": _OPENAI,
    "ctrl": _CTRL,
    "diffllama": _DIFFLLAMA,
    "doge": _DOGE,
    "modernbert-decoder": _MODERNBERT_DECODER,
}


class Variant(NamedTuple):
    """A plan for those configurations of an architecture whose layers are made in another way. when: in words."""

    when: str
    applies: Callable[[Any], bool]
    plan: Plan


VARIANTS: dict[str, tuple[Variant, ...]] = {
    "falcon": (
        Variant("with new_decoder_architecture", lambda config: config.new_decoder_architecture, _FALCON_NEW),
        Variant("without multi_query", lambda config: not config.multi_query, _FALCON_MANY),
    ),
    "gpt_bigcode": (Variant("without multi_query", lambda config: not config.multi_query, _GPT_BIGCODE_MANY),),
    "stablelm": (Variant("with qk_layernorm", lambda config: config.qk_layernorm, _STABLELM_NORMED),),
}
