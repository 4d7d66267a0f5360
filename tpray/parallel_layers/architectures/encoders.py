"""Encoders: every token sees the whole row, and the label is read from the first one, or from a mean."""

from __future__ import annotations

from dataclasses import replace

from tpray.parallel_layers.architectures.common import HEAD, ONE_TOKEN, REST, SMALL
from tpray.parallel_layers.plan import Cut, Plan, Rule

_BERT_ATTENTION = (
    Rule("*.attention.self.query", Cut.QUERY),
    Rule("*.attention.self.key", Cut.QUERY),
    Rule("*.attention.self.value", Cut.QUERY),
    Rule("*.attention.output.dense", Cut.ATTENTION_OUTPUT),
)
_BERT_FEED_FORWARD = (
    Rule("*.intermediate.dense", Cut.UP),
    Rule("*.layer.*.output.dense", Cut.DOWN),
)
_BERT = Plan(_BERT_ATTENTION + _BERT_FEED_FORWARD + REST)
_COUNTS_HEADS = (("*.attention.self", ("num_attention_heads", "all_head_size")),)

_ROBERTA = replace(_BERT, pad_shifts_positions=True)

_XLM_ROBERTA = replace(
    _ROBERTA,  # a vocabulary of 250,000 is two thirds of the model
    rules=(Rule("*.embeddings.word_embeddings", Cut.VOCAB), *_ROBERTA.rules),
)

_DISTILBERT = Plan(
    (
        Rule("*.attention.q_lin", Cut.QUERY),
        Rule("*.attention.k_lin", Cut.QUERY),
        Rule("*.attention.v_lin", Cut.QUERY),
        Rule("*.attention.out_lin", Cut.ATTENTION_OUTPUT),
        Rule("*.ffn.lin1", Cut.UP),
        Rule("*.ffn.lin2", Cut.DOWN),
        *REST,
    )
)

_ALBERT = Plan(
    (
        Rule("*.attention.query", Cut.QUERY),
        Rule("*.attention.key", Cut.QUERY),
        Rule("*.attention.value", Cut.QUERY),
        Rule("*.attention.dense", Cut.ATTENTION_OUTPUT),
        Rule("*.ffn", Cut.UP),
        Rule("*.ffn_output", Cut.DOWN),
        Rule("*.embedding_hidden_mapping_in", Cut.REPLICATED, SMALL),
        *REST,
    )
)

_MPNET = Plan(
    (
        Rule("*.attention.attn.[qkv]", Cut.QUERY),
        Rule("*.attention.attn.o", Cut.ATTENTION_OUTPUT),
        Rule("*.relative_attention_bias", Cut.QUERY),
        *_BERT_FEED_FORWARD,
        *REST,
    ),
    local=(("*.attention.attn", ("num_attention_heads", "all_head_size")),),
    pad_shifts_positions=True,
    padding_position=1,  # whatever its pad_token_id
)

_DEBERTA = Plan(
    (
        Rule("*.attention.self.in_proj", Cut.QUERY),
        Rule("*.attention.self.[qv]_bias", Cut.QUERY),
        Rule("*.attention.self.pos_proj", Cut.QUERY),
        Rule("*.attention.self.pos_q_proj", Cut.QUERY),
        Rule("*.attention.output.dense", Cut.ATTENTION_OUTPUT),
        *_BERT_FEED_FORWARD,
        Rule("*.rel_embeddings", Cut.REPLICATED, SMALL),
        *REST,
    ),
    local=_COUNTS_HEADS,
)

_DEBERTA_V2 = Plan(
    (
        Rule("*.attention.self.*_proj", Cut.QUERY),
        Rule("*.attention.output.dense", Cut.ATTENTION_OUTPUT),
        *_BERT_FEED_FORWARD,
        Rule("*.rel_embeddings", Cut.REPLICATED, SMALL),
        Rule("*.encoder.conv.*", Cut.REPLICATED, "one convolution over all features"),
        *REST,
    ),
    local=_COUNTS_HEADS,
)

_MODERNBERT = Plan(
    (
        Rule("*.attn.Wqkv", Cut.QKV),
        Rule("*.attn.Wo", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.Wi", Cut.GATE_UP),
        Rule("*.mlp.Wo", Cut.DOWN),
        Rule("head.*", Cut.REPLICATED, HEAD),
        *REST,
    )
)

_CONVBERT = Plan(
    (
        Rule("*.attention.*", Cut.REPLICATED, "its convolution makes one head's kernels from every head's features"),
        *_BERT_FEED_FORWARD,
        *REST,
    ),
    reads_padding=True,
)

_NYSTROMFORMER = Plan(
    (Rule("*.attention.self.conv", Cut.QUERY), *_BERT.rules),
    local=(
        *_COUNTS_HEADS,
        ("*.attention.self.conv", ("in_channels", "out_channels", "groups")),
    ),
    reads_padding=True,
)

_XLM = Plan(
    (
        Rule("*.attentions.*.[qkv]_lin", Cut.QUERY),
        Rule("*.attentions.*.out_lin", Cut.ATTENTION_OUTPUT),
        Rule("*.ffns.*.lin1", Cut.UP),
        Rule("*.ffns.*.lin2", Cut.DOWN),
        Rule("*_embeddings", Cut.REPLICATED, SMALL),
        Rule("*.embeddings", Cut.REPLICATED, SMALL),
        Rule("sequence_summary.*", Cut.REPLICATED, ONE_TOKEN),
        *REST,
    ),
    local=(("*.attentions.*", ("n_heads",)),),
)

_ESM = replace(
    _ROBERTA,
    rules=(
        *_ROBERTA.rules,
        Rule("*.contact_head.regression", Cut.REPLICATED, "not part of classification"),
    ),
)

_NOMIC_BERT = Plan(
    (
        Rule("*.self_attn.q_proj", Cut.QUERY),
        Rule("*.self_attn.[kv]_proj", Cut.KEY_VALUE),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.gate_proj", Cut.UP),
        Rule("*.mlp.up_proj", Cut.UP),
        Rule("*.mlp.down_proj", Cut.DOWN),
        Rule("*.embed_tokens", Cut.VOCAB),
        *REST,
    )
)

_MEGATRON_BERT = Plan((*_BERT.rules, Rule("*.ln", Cut.REPLICATED, "a vector")), local=_COUNTS_HEADS)

_REMBERT = Plan(
    (
        *_BERT_ATTENTION,
        *_BERT_FEED_FORWARD,
        Rule("*.embedding_hidden_mapping_in", Cut.REPLICATED, SMALL),
        Rule("*.embeddings.word_embeddings", Cut.VOCAB),
        *REST,
    ),
    local=_COUNTS_HEADS,
)

_XMOD = replace(
    _XLM_ROBERTA,
    rules=(
        Rule("*.adapter_modules.*.dense1", Cut.UP),
        Rule("*.adapter_modules.*.dense2", Cut.DOWN),
        *_XLM_ROBERTA.rules,
    ),
)

_LUKE = Plan(
    (
        *_BERT_ATTENTION,
        Rule("*.attention.self.*_query", Cut.REPLICATED, "for entities, which a text has none of"),
        Rule("*.entity_embeddings.*", Cut.REPLICATED, "for entities, which a text has none of"),
        *_BERT_FEED_FORWARD,
        *REST,
    ),
    local=_COUNTS_HEADS,
    pad_shifts_positions=True,
)

_GTE = Plan(
    (
        Rule("*.self_attn.[qkv]_proj", Cut.QUERY),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.gate_proj", Cut.UP),
        Rule("*.mlp.up_proj", Cut.UP),
        Rule("*.mlp.down_proj", Cut.DOWN),
        Rule("*.word_embeddings", Cut.VOCAB),
        *REST,
    )
)

_JINA_V3 = Plan(
    (
        Rule("*.self_attn.[qkv]_proj", Cut.QUERY),
        Rule("*.self_attn.o_proj", Cut.ATTENTION_OUTPUT),
        Rule("*.mlp.fc1", Cut.UP),
        Rule("*.mlp.fc2", Cut.DOWN),
        Rule("*.word_embeddings", Cut.VOCAB),
        *REST,
    )
)

_MOBILEBERT = Plan(
    (
        Rule("*bottleneck*", Cut.REPLICATED, "a quarter of a layer's features: the collective would cost more"),
        *_BERT_ATTENTION,
        *_BERT_FEED_FORWARD,
        *REST,
    ),
    reads_padding=True,  # a word's embedding has those of its neighbours beside it
)

_BIG_BIRD = replace(_BERT, local=_COUNTS_HEADS)

_LILT = Plan(
    (
        *_BERT_ATTENTION,
        Rule("*.attention.self.layout_query", Cut.QUERY),
        Rule("*.attention.self.layout_key", Cut.QUERY),
        Rule("*.attention.self.layout_value", Cut.QUERY),
        Rule("*.attention.layout_output.dense", Cut.ATTENTION_OUTPUT),
        *_BERT_FEED_FORWARD,
        Rule("*.layout_intermediate.dense", Cut.UP),
        Rule("*.layout_output.dense", Cut.DOWN),
        *REST,
    ),
    local=_COUNTS_HEADS,
    pad_shifts_positions=True,
)

ENCODERS: dict[str, Plan] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _XLM_ROBERTA,
    "camembert": _ROBERTA,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
    "mpnet": _MPNET,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA_V2,
    "modernbert": _MODERNBERT,
    "roformer": replace(_BERT, local=_COUNTS_HEADS),
    "ernie": _BERT,
    "convbert": _CONVBERT,
    "nystromformer": _NYSTROMFORMER,
    "xlm": _XLM,
    "flaubert": _XLM,
    "esm": _ESM,
    "layoutlm": _BERT,
    "nomic_bert": _NOMIC_BERT,
    "xlm-roberta-xl": _XLM_ROBERTA,
    "megatron-bert": _MEGATRON_BERT,
    "roberta-prelayernorm": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "rembert": _REMBERT,
    "xmod": _XMOD,
    "luke": _LUKE,
    "gte": _GTE,
    "jina_embeddings_v3": _JINA_V3,
    "mobilebert": _MOBILEBERT,
    "big_bird": _BIG_BIRD,
    "lilt": _LILT,
}
