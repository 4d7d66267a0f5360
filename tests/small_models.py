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
    "flaubert": _XLM,
}  # fmt: skip
"""What architectures call the sizes in their configurations, where they have names of their own."""

_GROUPED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "head_dim": 16}
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
}  # fmt: skip
"""What each needs besides, or what makes it do more than its defaults would."""
