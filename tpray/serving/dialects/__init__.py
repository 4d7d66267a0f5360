"""HTTP dialects: how clients of other servers ask, and what they expect back. One module each over the same engine.

To add one: a module with a `base.Dialect`, and a row here. No Ray, no queue: a dialect parses, calls the engine and
renders.
"""

from __future__ import annotations

from tpray.serving.dialects import (
    cohere,
    hugging_face,
    infinity,
    open_inference,
    tei,
    tei_rerank,
    tei_tokens,
    token_classification,
    vllm,
    vllm_score,
)
from tpray.serving.dialects.base import Dialect

DIALECTS: tuple[Dialect, ...] = (
    tei.DIALECT,
    tei_rerank.DIALECT,
    tei_tokens.DIALECT,
    hugging_face.DIALECT,
    cohere.DIALECT,
    vllm.DIALECT,
    vllm_score.DIALECT,
    infinity.DIALECT,
    token_classification.DIALECT,
    open_inference.DIALECT,
)
"""The first also words the errors of routes that do not exist."""
