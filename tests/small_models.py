"""The sizes of the small models that tests make of each architecture."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 80,
    "num_labels": 3,
}


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
    "gpt2": {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
    },
    "xlm": _XLM,
    "bart": _BART, "mbart": _BART, "plbart": _BART, "mvp": _BART, "bigbird_pegasus": _BART,
    "t5": _T5, "mt5": _T5, "umt5": _T5,
    "flaubert": _XLM,
}  # fmt: skip
"""What architectures call the sizes in their configurations, where they have names, or two of them, of their own."""

_GROUPED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "head_dim": 16}
_ENDED = {"d_kv": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
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
}  # fmt: skip
"""What each needs besides, or what makes it do more than its defaults would."""
