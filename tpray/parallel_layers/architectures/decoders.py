"""Decoders: a token sees those before it, and the label is read from a row's last one."""

from __future__ import annotations

from tpray.parallel_layers.architectures.common import REST, SMALL
from tpray.parallel_layers.plan import Cut, Plan, Rule

_DECODER = Plan(
    (
        Rule("*.self_attn.q_proj", Cut.QUERY),
        Rule("*.self_attn.[kv]_proj", Cut.KEY_VALUE),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.gate_proj", Cut.UP),
        Rule("*.mlp.up_proj", Cut.UP),
        Rule("*.mlp.down_proj", Cut.DOWN),
        Rule("*.embed_tokens", Cut.VOCAB),
        *REST,
    ),
    reads_last_token=True,
)

_GPT2 = Plan(
    (
        Rule("*.attn.c_attn", Cut.QKV),
        Rule("*.attn.c_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.c_fc", Cut.UP),
        Rule("*.mlp.c_proj", Cut.DOWN),
        Rule("*.wte", Cut.VOCAB),
        Rule("*.wpe", Cut.REPLICATED, SMALL),
        Rule("*.ln_*", Cut.REPLICATED, "a vector"),
        *REST,
    ),
    local=(("*.attn", ("num_heads", "split_size")),),
    reads_last_token=True,
)

DECODERS: dict[str, Plan] = {
    "gpt2": _GPT2,
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
}
