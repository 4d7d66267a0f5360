"""What a sharding plan is: which layer of an architecture is split, and how.

`tpray.parallel_layers.architectures` has one for each ``config.model_type``. A plan is a list of rules, the first
whose pattern matches a layer's path decides; a layer that no rule mentions is an error, so that nothing is
left whole by accident.

The pairs follow Megatron-LM (arXiv:1909.08053, section 3): a column-parallel layer feeds a row-parallel
one, so that attention costs one all-reduce and the feed-forward another. Attention is cut between heads, the
feed-forward anywhere; neither has to divide evenly. Upstream's tutorial shards attention only; here the
feed-forward, two thirds of a layer, is sharded too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from tpray.errors import ConfigError, DegreeError, UnsupportedModelError
from tpray.parallel_layers.files import read_json


class Split(StrEnum):
    """What happens to a layer's parameters."""

    COLUMN = "column"  # cut by output features; the output stays cut
    ROW = "row"  # cut by input features; all-reduce after it
    VOCAB = "vocab"  # embedding, cut by rows; all-reduce after it
    NORM = "norm"  # over the features of all heads: cut like them; what it divides by is summed over the ranks
    REPLICATED = "replicated"  # whole on every rank


class Unit(StrEnum):
    """What must not be cut in two."""

    HEAD = "head"
    KEY_VALUE_HEAD = "key/value head"  # shared by several query heads in grouped-query attention
    FEATURE = "feature"


class Cut(Enum):
    """What a rule says of a layer: (split, unit, how many layers of one size are fused in it).

    In a plan file a cut goes by its name in lower case.
    """

    QUERY = (Split.COLUMN, Unit.HEAD, 1)  # also what holds q, k and v of each head side by side
    KEY_VALUE = (Split.COLUMN, Unit.KEY_VALUE_HEAD, 1)
    QKV = (Split.COLUMN, Unit.HEAD, 3)  # all heads' q, then all key/value heads' k, then all their v
    QKV_GROUPS = (Split.COLUMN, Unit.KEY_VALUE_HEAD, 3)  # of each key/value head: its query heads' q, its k, its v
    QUERY_NORM = (Split.NORM, Unit.HEAD, 1)
    KEY_VALUE_NORM = (Split.NORM, Unit.KEY_VALUE_HEAD, 1)
    ATTENTION_OUTPUT = (Split.ROW, Unit.HEAD, 1)
    UP = (Split.COLUMN, Unit.FEATURE, 1)
    GATE_UP = (Split.COLUMN, Unit.FEATURE, 2)
    DOWN = (Split.ROW, Unit.FEATURE, 1)
    VOCAB = (Split.VOCAB, Unit.FEATURE, 1)
    REPLICATED = (Split.REPLICATED, Unit.FEATURE, 1)

    @property
    def split(self) -> Split:
        return self.value[0]

    @property
    def unit(self) -> Unit:
        return self.value[1]

    @property
    def parts(self) -> int:
        return self.value[2]


ANY_LENGTH = 2048
"""Tokens of the longest row where positions are relative, so that no table ends, and config.json says no n_positions:
a bound for the memory of attention's scores."""

_FLAGS = ("pad_shifts_positions", "reads_last_token", "reads_padding")
_LISTS = ("local", "head_inputs", "spare_position")


class Rule(NamedTuple):
    """What happens to the layers whose dotted path matches ``pattern`` (`fnmatch` style). why: if it stays whole."""

    pattern: str
    cut: Cut
    why: str = ""


def deal(count: int, rank: int, size: int) -> tuple[int, int]:
    """Which [start, stop) of ``count`` things belong to ``rank``: neighbours, and none has two more than another."""
    return count * rank // size, count * (rank + 1) // size


@dataclass(frozen=True)
class Share:
    """What one rank holds: [start, stop) of the attention heads and of the key/value heads that they use."""

    rank: int
    size: int
    all_heads: int
    all_key_value_heads: int
    heads: tuple[int, int]
    key_value_heads: tuple[int, int]

    @classmethod
    def of(cls, heads: int, key_value_heads: int, rank: int, size: int) -> Share:
        """The share of ``rank`` of ``size``.

        A key/value head stays with the query heads that use it. When there are more ranks than key/value heads,
        each goes to several ranks, which share its query heads out. Source: the grouped-query attention of
        arXiv:2305.13245, section 2.2, whose remark on tensor parallelism names the replication.
        """
        group = heads // key_value_heads
        if size <= key_value_heads:
            start, stop = deal(key_value_heads, rank, size)
            return cls(rank, size, heads, key_value_heads, (start * group, stop * group), (start, stop))
        owner = next(k for k in range(key_value_heads) if rank < deal(size, k, key_value_heads)[1])
        first, last = deal(size, owner, key_value_heads)
        start, stop = deal(group, rank - first, last - first)
        own = owner * group + start, owner * group + stop
        return cls(rank, size, heads, key_value_heads, own, (owner, owner + 1))

    def scaled(self, value: int, key_value: bool = False) -> int:
        """A number that counts all heads, or their features, as one of this rank's own; or all key/value heads."""
        own, every = (self.key_value_heads, self.all_key_value_heads) if key_value else (self.heads, self.all_heads)
        return value * (own[1] - own[0]) // every

    def bounds(self, cut: Cut, full: int) -> tuple[tuple[int, int], ...]:
        """Which [start, stop) pieces of a dimension of ``full`` features are this rank's."""
        if cut is Cut.QKV:
            return self._fused(full)
        if cut is Cut.QKV_GROUPS:
            return self._fused_by_group(full)
        part = full // cut.parts
        if cut.unit is Unit.FEATURE:
            start, stop = deal(part, self.rank, self.size)
        else:
            by_query = cut.unit is Unit.HEAD
            width = part // (self.all_heads if by_query else self.all_key_value_heads)
            start, stop = (edge * width for edge in (self.heads if by_query else self.key_value_heads))
        return tuple((i * part + start, i * part + stop) for i in range(cut.parts))

    def _fused(self, full: int) -> tuple[tuple[int, int], ...]:
        """Of all heads' q, then all key/value heads' k, then their v."""
        width = full // (self.all_heads + 2 * self.all_key_value_heads)
        offsets = 0, self.all_heads, self.all_heads + self.all_key_value_heads
        edges = self.heads, self.key_value_heads, self.key_value_heads
        return tuple((width * (at + a), width * (at + b)) for at, (a, b) in zip(offsets, edges, strict=True))

    def _fused_by_group(self, full: int) -> tuple[tuple[int, int], ...]:
        """Of the q of a key/value head's query heads, its k and its v, for one key/value head after another."""
        width = full // (self.all_heads + 2 * self.all_key_value_heads)
        group = self.all_heads // self.all_key_value_heads
        pieces = []
        for owner in range(*self.key_value_heads):
            at = owner * (group + 2)
            own = [min(max(edge - owner * group, 0), group) for edge in self.heads]
            pieces += [(at + own[0], at + own[1]), (at + group, at + group + 2)]
        return tuple((width * start, width * stop) for start, stop in pieces)

    @property
    def holders(self) -> int:
        """How many ranks hold this rank's key/value heads: 1, unless there are more ranks than such heads."""
        if self.size <= self.all_key_value_heads:
            return 1
        first, last = deal(self.size, self.key_value_heads[0], self.all_key_value_heads)
        return last - first


@dataclass(frozen=True)
class Plan:
    """How one architecture is sharded.

    rules: the first that matches decides.
    local: (pattern, attributes) of modules that count all heads or their features, and must count a rank's own; those
        with ``kv`` or ``key_value`` in their names count key/value heads; ``config.NAME`` is of the module's config.
    head_inputs: (pattern, arguments) of modules that are given all heads' numbers, and must be given a rank's own.
    spare_position: (pattern, names) of buffers, and of counts in ``config.NAME``, that are as long as a row may be and
        are made one longer: to torch.export a row as long as the buffer that it cuts is another program.
    key_value_heads: what the configuration calls how many there are; or this number.
    pad_shifts_positions: position ids start behind ``pad_token_id``, which costs that many of the table; or behind
        padding_position, where the architecture has a constant.
    reads_last_token: the label is read from a row's last token, as decoders do.
    reads_padding: a row's logits depend on how much padding it has, so that it only goes with rows of its length.
    """

    rules: tuple[Rule, ...]
    local: tuple[tuple[str, tuple[str, ...]], ...] = ()
    head_inputs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    spare_position: tuple[tuple[str, tuple[str, ...]], ...] = ()
    key_value_heads: str | int = "num_key_value_heads"
    pad_shifts_positions: bool = False
    padding_position: int | None = None
    reads_last_token: bool = False
    reads_padding: bool = False

    def max_length(self, config: Any) -> int:
        """How many tokens, special ones included, a row may have.

        Raises:
            ConfigError: positions start behind ``pad_token_id``, and there is none.
        """
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
        positions = int(next(filter(None, named), ANY_LENGTH))
        if getattr(config, "attention_type", None) == "block_sparse":  # up to here it is the full attention's
            positions = min(positions, (5 + 2 * config.num_random_blocks) * config.block_size)
        if not self.pad_shifts_positions:
            return positions
        pad = config.pad_token_id if self.padding_position is None else self.padding_position
        if pad is None:
            raise ConfigError(
                f"config.json names no pad_token_id, behind which the positions of a {config.model_type} start: give "
                "it the id of the tokenizer's pad token"
            )
        return positions - (int(pad) + 1)

    def rule_for(self, path: str) -> Rule:
        """The rule that decides on the layer, or the parameter, at ``path``.

        Raises:
            UnsupportedModelError: none mentions it.
        """
        for rule in self.rules:
            if fnmatchcase(path, rule.pattern):
                return rule
        raise UnsupportedModelError(
            f"the sharding plan says nothing about the layer {path}: give a plan of your own with a rule for it "
            "(--plan FILE), or add one to tpray's table"
        )

    def is_sharded(self, path: str) -> bool:
        """Whether the linear layer at ``path`` is split: one of those that make up nearly all of the work.

        The others (pooler, classification head) see one token per row and decide the label: they keep their
        precision where the sharded ones are quantised.
        """
        return self.rule_for(path).cut.split in (Split.COLUMN, Split.ROW)

    def shards_heads(self) -> bool:
        """Whether attention is cut, rather than whole on every rank."""
        return any(rule.cut.unit is not Unit.FEATURE for rule in self.rules)

    def share(self, config: Any, rank: int, size: int) -> Share:
        """What ``rank`` of ``size`` holds of a model of this ``config``."""
        if not self.shards_heads():
            return Share.of(size, size, rank, size)
        heads: int = config.num_attention_heads
        named = self.key_value_heads
        shared = named if isinstance(named, int) else getattr(config, named, None)
        return Share.of(heads, shared or heads, rank, size)

    def check_degree(self, config: Any, tp: int) -> None:
        """Refuse a degree that the heads rule out.

        Raises:
            DegreeError: ``tp`` leaves a rank without an attention head; the message names the degrees that would do.
            UnsupportedModelError: encoder and decoder have not as many heads, so that no head of one is as wide as
                one of the other.
        """
        decoders = getattr(config, "decoder_attention_heads", None)
        if self.shards_heads() and tp > 1 and decoders not in (None, config.num_attention_heads):
            raise UnsupportedModelError(
                f"this {config.model_type} has {config.num_attention_heads} attention heads in its encoder and "
                f"{decoders} in its decoder, which tpray cannot share out together: serve it with tp 1"
            )
        if self.shards_heads() and tp > config.num_attention_heads:
            raise DegreeError(
                f"tp {tp} is more than the {config.num_attention_heads} attention heads of this {config.model_type}, "
                f"and a head is not cut: use 1 to {config.num_attention_heads} ranks"
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as a plan file holds it."""
        return {
            "rules": [[rule.pattern, rule.cut.name.lower(), rule.why] for rule in self.rules],
            "local": [[pattern, list(names)] for pattern, names in self.local],
            "head_inputs": [[pattern, list(names)] for pattern, names in self.head_inputs],
            "spare_position": [[pattern, list(names)] for pattern, names in self.spare_position],
            "key_value_heads": self.key_value_heads,
            "pad_shifts_positions": self.pad_shifts_positions,
            "padding_position": self.padding_position,
            "reads_last_token": self.reads_last_token,
            "reads_padding": self.reads_padding,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """Read what `to_json` gives; everything but the rules' patterns and cuts may be left out.

        Raises:
            ConfigError: it is not a plan; the message says what is wrong and shows one that would work.
        """
        shape = '{"rules": [["*.attention.query", "query"], ...], "local": [["*.attention", ["num_heads"]]]}'
        try:
            flags: dict[str, Any] = {name: bool(stored.get(name, False)) for name in _FLAGS}
            unknown = set(stored) - {"rules", *_LISTS, "key_value_heads", "padding_position", *flags}
            position = stored.get("padding_position")
            position = None if position is None else int(position)
            shared = stored.get("key_value_heads", cls.key_value_heads)
            if type(shared) not in (str, int):
                raise ValueError("key_value_heads is a name or a number")
            if unknown:
                raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
            rules = tuple(Rule(str(pattern), Cut[cut.upper()], *why) for pattern, cut, *why in stored["rules"])
            lists: dict[str, Any] = {
                name: tuple((str(p), tuple(each)) for p, each in stored.get(name, ())) for name in _LISTS
            }
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            cuts = ", ".join(cut.name.lower() for cut in Cut)
            raise ConfigError(f"this is not a sharding plan ({e}); it looks like {shape}, with the cuts {cuts}") from e
        return cls(rules, padding_position=position, key_value_heads=shared, **lists, **flags)


def read_plan(plan: Path | Mapping[str, Any]) -> Plan:
    """The plan in a JSON file, or in what such a file holds.

    Raises:
        ConfigError: the file cannot be read, or it is not a plan.
    """
    if isinstance(plan, Mapping):
        return Plan.from_json(plan)
    try:
        stored = read_json(plan)
    except (OSError, ValueError) as e:
        raise ConfigError(f"the sharding plan {plan} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    return Plan.from_json(stored if isinstance(stored, dict) else {})
