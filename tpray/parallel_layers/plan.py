"""The one sharding table: which layer of which architecture is split, and how.

Read it bottom-up: `PLANS` maps a ``config.model_type`` to a `Plan`; a plan is a list of rules, the first
whose pattern matches a module's path decides; a leaf module that no rule mentions is an error, so that
nothing is left whole by accident.

The pairs follow Megatron-LM (arXiv:1909.08053, section 3): a column-parallel layer feeds a row-parallel
one, so that attention costs one all-reduce and the feed-forward another. Attention is cut between heads.
Upstream's tutorial shards attention only; here the feed-forward, two thirds of a layer, is sharded too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from tpray.errors import DegreeError, UnsupportedModelError


class Split(str, Enum):
    """What happens to a module's parameters."""

    COLUMN = "column"  # linear, cut by output features; the output stays cut
    ROW = "row"  # linear, cut by input features; all-reduce after it
    VOCAB = "vocab"  # embedding, cut by rows; all-reduce after it
    REPLICATED = "replicated"  # whole on every rank


@dataclass(frozen=True)
class Plan:
    """How one architecture is sharded.

    rules: (pattern, split) pairs; a pattern is `fnmatch` style over a module's dotted path.
    heads, feed_forward: the config's attributes that the degree must divide.
    pad_shifts_positions: position ids start behind ``pad_token_id``, which costs that many of the table.
    """

    rules: tuple[tuple[str, Split], ...]
    heads: str = "num_attention_heads"
    feed_forward: str = "intermediate_size"
    pad_shifts_positions: bool = False

    def max_length(self, config: Any) -> int:
        """How many tokens, special ones included, a row may have."""
        positions: int = config.max_position_embeddings
        return positions - (config.pad_token_id + 1 if self.pad_shifts_positions else 0)

    def split_of(self, path: str) -> Split:
        """How the module at ``path`` is split.

        Raises:
            UnsupportedModelError: no rule mentions it.
        """
        for pattern, split in self.rules:
            if fnmatchcase(path, pattern):
                return split
        raise UnsupportedModelError(
            f"the sharding plan says nothing about the layer {path}; add a rule for it to tpray's plan table"
        )

    def is_sharded(self, path: str) -> bool:
        """Whether the linear layer at ``path`` is split: one of those that make up nearly all of the work.

        The others (pooler, classification head) see one token per row and decide the label: they keep their
        precision where the sharded ones are quantised.
        """
        return self.split_of(path) in (Split.COLUMN, Split.ROW)

    def valid_degrees(self, config: Any) -> list[int]:
        """Every tensor-parallel degree that divides the heads and the feed-forward, ascending."""
        heads, feed_forward = getattr(config, self.heads), getattr(config, self.feed_forward)
        return [tp for tp in range(1, heads + 1) if heads % tp == 0 and feed_forward % tp == 0]

    def check_degree(self, config: Any, tp: int) -> None:
        """Raise `DegreeError`, naming the degrees that would do, unless ``tp`` divides the model."""
        degrees = self.valid_degrees(config)
        if tp not in degrees:
            raise DegreeError(
                f"tp {tp} does not divide this {config.model_type}: {getattr(config, self.heads)} attention "
                f"heads and a feed-forward of {getattr(config, self.feed_forward)} can be shared by "
                f"{', '.join(map(str, degrees))} ranks"
            )


_BERT = Plan(
    rules=(
        ("*.attention.self.query", Split.COLUMN),
        ("*.attention.self.key", Split.COLUMN),
        ("*.attention.self.value", Split.COLUMN),
        ("*.attention.output.dense", Split.ROW),
        ("*.intermediate.dense", Split.COLUMN),
        ("*.layer.*.output.dense", Split.ROW),
        ("*.LayerNorm", Split.REPLICATED),
        ("*.embeddings.*", Split.REPLICATED),  # small beside the layers, and a collective less
        ("*.embeddings_project", Split.REPLICATED),
        ("*.pooler.dense", Split.REPLICATED),  # one token per row
        ("classifier", Split.REPLICATED),
        ("classifier.*", Split.REPLICATED),
    )
)

_ROBERTA = replace(_BERT, pad_shifts_positions=True)

_DISTILBERT = Plan(
    rules=(
        ("*.attention.q_lin", Split.COLUMN),
        ("*.attention.k_lin", Split.COLUMN),
        ("*.attention.v_lin", Split.COLUMN),
        ("*.attention.out_lin", Split.ROW),
        ("*.ffn.lin1", Split.COLUMN),
        ("*.ffn.lin2", Split.ROW),
        ("*_layer_norm", Split.REPLICATED),
        ("*.embeddings.*", Split.REPLICATED),
        ("pre_classifier", Split.REPLICATED),
        ("classifier", Split.REPLICATED),
    ),
    heads="n_heads",
    feed_forward="hidden_dim",
)

PLANS: dict[str, Plan] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}


def plan_for(model_type: str) -> Plan:
    """The plan of an architecture, by its ``config.model_type``.

    Raises:
        UnsupportedModelError: the table has no row for it; the message lists those it has.
    """
    try:
        return PLANS[model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"no sharding plan for the architecture {model_type!r}; tpray can shard {', '.join(PLANS)}"
        ) from None
