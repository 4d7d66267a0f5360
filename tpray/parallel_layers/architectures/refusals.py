"""What tpray does not shard, and why: each reason goes behind the architecture's name."""

from __future__ import annotations

EXPERTS = "is a mixture of experts, and tpray shards dense models"
LATENT = "has multi-head latent attention, and tpray has no plan for its compressed keys and values"
RECURRENT = "has layers with a state that goes from token to token, and tpray shards softmax attention"

REFUSED: dict[str, str] = {
    "gpt_oss": EXPERTS,
    "jetmoe": EXPERTS,
    "qwen3_5": RECURRENT,
    "zamba": RECURRENT,
    "zamba2": RECURRENT,
}
"""Those of which transformers states no plan that would tell; `upstream` finds the others."""
