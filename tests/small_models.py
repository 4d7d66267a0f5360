"""The sizes of the small models that tests make of each architecture."""

from __future__ import annotations

from typing import Any

import pytest

from tpray.parallel_layers.architectures import PLANS

SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 80,
    "num_labels": 3,
}


_GPT = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
}  # fmt: skip
_XLM = {
    "vocab_size": "n_words", "hidden_size": "emb_dim", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}  # fmt: skip
_BART = {
    "hidden_size": "d_model", "num_hidden_layers": "encoder_layers decoder_layers",
    "num_attention_heads": "encoder_attention_heads decoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim decoder_ffn_dim",
}  # fmt: skip
_T5 = {
    "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff", "max_position_embeddings": "n_positions",
}  # fmt: skip
OWN_NAMES = {
    "distilbert": {
        "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    },
    "gpt2": _GPT,
    "gpt-sw3": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _GPT,
    "openai-gpt": _GPT,
    "ctrl": _GPT | {"intermediate_size": "dff"},
    "gpt_neo": {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    "falcon": {"intermediate_size": "ffn_hidden_size"},
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "mpt": {
        "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
    "opt": {"intermediate_size": "ffn_dim"},
    "xlm": _XLM,
    "bart": _BART, "mbart": _BART, "plbart": _BART, "mvp": _BART, "bigbird_pegasus": _BART,
    "t5": _T5, "mt5": _T5, "umt5": _T5,
    "flaubert": _XLM,
}  # fmt: skip
"""What architectures call the sizes in their configurations, where they have names, or two of them, of their own."""

_GROUPED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "head_dim": 16}
_ENDED = {"d_kv": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_TWO_ROPES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0},
    },
}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
DECODERS: dict[str, dict[str, Any]] = {
    "mistral": _GROUPED | {"sliding_window": 12},
    "ministral": _GROUPED | _WINDOW,
    "ministral3": _GROUPED | {"sliding_window": 12},
    "gemma2": _GROUPED | _WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": _GROUPED | _WINDOW | _TWO_ROPES | {"query_pre_attn_scalar": 16},
    "phi": _GROUPED | _PARTIAL | {"qk_layernorm": True},
    "phi3": _GROUPED | {"sliding_window": 12},
    "glm": _GROUPED | _PARTIAL | {"attention_bias": True},
    "glm4": _GROUPED | _PARTIAL | {"attention_bias": True},
    "olmo": _GROUPED | {"clip_qkv": 2.0},
    "olmo2": _GROUPED | {"attention_bias": True},
    "olmo3": _GROUPED | _WINDOW,
    "gpt_neox": _ENDS | _PARTIAL,
    "starcoder2": _GROUPED | {"sliding_window": 12},
    "stablelm": _GROUPED | _PARTIAL | {"use_qkv_bias": True},
    "smollm3": _GROUPED | {"no_rope_layers": [1, 0]},
    "nemotron": _GROUPED | _PARTIAL,
    "helium": _GROUPED,
    "arcee": _GROUPED,
    "seed_oss": _GROUPED,
    "exaone4": _GROUPED | _WINDOW,
    "cohere_compass_text": _GROUPED | _WINDOW | _TWO_ROPES,
    "eurobert": _GROUPED | {"mask_token_id": 3},
    "esmc": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "mask_token_id": 4},
    "ultrabert": _GROUPED | _WINDOW | _TWO_ROPES | {"cls_token_id": 1, "sep_token_id": 2},
    "doge": _GROUPED,
    "falcon": _ENDS,
    "bloom": _ENDS,
    "opt": _ENDS | {"word_embed_proj_dim": 32},
    "gpt_neo": _ENDS | {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "gptj": _ENDS | {"rotary_dim": 8},
    "gpt_bigcode": _ENDS,
    "gpt-sw3": _ENDS,
    "mpt": _ENDS,
    "persimmon": _ENDS | _PARTIAL,
    "biogpt": _ENDS,
    "openai-gpt": _ENDS,
    "ctrl": _ENDS,
    "hunyuan_v1_dense": _GROUPED,
    "minicpm3": _ENDS | {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "diffllama": _GROUPED,
    "modernbert-decoder": _ENDS | _WINDOW | {
        "cls_token_id": 1, "sep_token_id": 2, "attention_bias": True, "mlp_bias": True,
    },
}  # fmt: skip
"""What the decoders, and the encoders that look like them, need: with windows that rows exceed."""
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16, "type_vocab_size": 2,
        "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "share_att_key": False,
    },
    "modernbert": {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
        "local_attention": 16, "attention_bias": True, "mlp_bias": True,
    },
    "roformer": {"embedding_size": 32},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3},
    "esm": {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "gpt2": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "llama": _GROUPED | {"attention_bias": True},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED | {"num_key_value_heads": 1},
    # Encoders.
    "rembert": {"input_embedding_size": 32},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 16, "hidden_size": 96},
    "bart": {"scale_embedding": True},
    "mbart": {"scale_embedding": True},
    "t5": _ENDED, "mt5": _ENDED | {"feed_forward_proj": "gated-gelu"}, "umt5": _ENDED,
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 48, "num_feedforward_networks": 2},
    **DECODERS,
}  # fmt: skip
"""What each needs besides, or what makes it do more than its defaults would."""

DERIVED = [model_type for model_type in DECODERS if model_type not in PLANS]
"""The architectures that have no row in the table: their plans are derived from transformers' own."""
SUPPORTED = [*PLANS, *DERIVED]

ALIKE = {
    "xlm-roberta-xl", "megatron-bert", "roberta-prelayernorm", "data2vec-text", "rembert", "luke", "gte",
    "jina_embeddings_v3", "big_bird", "lilt", "mbart", "plbart", "mvp", "mt5", "umt5", "bigbird_pegasus",
    *(set(DECODERS) - {"phi3", "falcon", "bloom", "mistral", "gemma2", "olmo2"}),
}  # fmt: skip
"""Those that differ from another by a rule or two: their parity is in `make test-all` alone, once in float32."""
DISTINCT = {*{repr(PLANS[m]): m for m in reversed(PLANS)}.values(), *DERIVED} - ALIKE
"""One architecture for each plan: the first that has it. Others are in the tiers above `make test`."""


def unless_distinct(mark: pytest.MarkDecorator, model_type: str, *values: Any) -> Any:
    """The parameters of a test, marked if another architecture has the same plan, or nearly."""
    return pytest.param(model_type, *values, marks=() if model_type in DISTINCT else mark)
