"""Rules that many architectures share: norms, embeddings, pooler and head, which stay whole."""

from __future__ import annotations

from tpray.parallel_layers.plan import Cut, Rule

SMALL = "small beside the layers, and a collective less"
ONE_TOKEN = "works on one token per row"
HEAD = "the head, small beside the layers"

_NORMS = (
    Rule("*LayerNorm*", Cut.REPLICATED, "a vector"),
    Rule("*layer_norm*", Cut.REPLICATED, "a vector"),
    Rule("*norm", Cut.REPLICATED, "a vector"),
)
_EMBEDDINGS = (
    Rule("*embeddings.*", Cut.REPLICATED, SMALL),
    Rule("*.embed_positions", Cut.REPLICATED, SMALL),
    Rule("*.embeddings_project", Cut.REPLICATED, SMALL),
)
_HEAD = (
    Rule("*pooler*", Cut.REPLICATED, ONE_TOKEN),
    Rule("classifier*", Cut.REPLICATED, HEAD),
    Rule("pre_classifier", Cut.REPLICATED, ONE_TOKEN),
    Rule("score", Cut.REPLICATED, HEAD),
)
REST = _NORMS + _EMBEDDINGS + _HEAD
