"""A plan from transformers' own: `derive` reads ``config.base_model_tp_plan`` where tpray's table has no row.

Transformers names a style for some layers. What each means for a rank, by transformers/distributed/tensor_parallel.py:

- ``colwise``: its own output features; ``rowwise``: its own input features, and a sum over the ranks.
- ``colwise_gather_output``, ``rowwise_split_input``: the same, between which all features are put together on every
  rank. Where they are heads, or a gate and what it gates, tpray keeps them apart: one all-reduce takes the place of the
  gathering and the splitting.
- ``replicated_with_grad_allreduce``: whole.

The styles do not say what must not be cut in two. That is found from sizes: what is as wide as all heads is cut between
heads, and what lies between a feed-forward's layers anywhere. What does not fit is refused, by name. A derived plan is
a reading of sizes, not a proof: the canary compares each group with the stock model before it serves.

Legend: N attention heads, K key/value heads, D features of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures.common import HEAD, SMALL
from tpray.parallel_layers.architectures.refusals import EXPERTS, LATENT, RECURRENT, REFUSED
from tpray.parallel_layers.plan import Cut, Plan, Rule
from tpray.parallel_layers.stock import empty_model, paths_to_decide, scale_of

VECTOR = "a vector"
ONE_FOR_ALL = "one for all heads"
LEFT_WHOLE = "transformers' plan leaves it whole"
_REFUSED_STYLES = {"moe_tp_experts": EXPERTS, "packed_colwise": EXPERTS, "mla_kv_a_proj": LATENT}
_COLUMN = ("colwise", "colwise_gather_output")
_ROW = ("rowwise", "rowwise_split_input")
_WHOLE = ("replicated_with_grad_allreduce",)
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")


def why_not(config: Any) -> str | None:
    """Why a model of this configuration cannot be sharded, in half a sentence; None: nothing is known against it."""
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    stated = getattr(config, "base_model_tp_plan", None) or {}
    found = next((_REFUSED_STYLES[style] for style in stated.values() if style in _REFUSED_STYLES), None)
    if found is None and "linear_attention" in (getattr(config, "layer_types", None) or ()):
        return RECURRENT
    return found


def classifier_types() -> list[str]:
    """Every type of model that transformers has a sequence classifier of, in its order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    return list(CLASSIFIERS)


def default_config(model_type: str) -> Any:
    """Transformers' configuration of a type, with what a few leave open although their models need it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    if getattr(config, "num_key_value_heads", 1) is None:
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "head_dim", 1) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds and not getattr(config, "rope_parameters", True):
        config.rope_parameters = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds}
    return config


def derive(config: Any) -> Plan | None:
    """The plan that transformers states, in tpray's cuts; None: it states none.

    Raises:
        UnsupportedModelError: it cannot be kept; the message names the pattern or the layer.
    """
    stated: dict[str, str] | None = getattr(config, "base_model_tp_plan", None)
    if not stated:
        return None
    return _Reading(config, stated).plan()


class _Reading:
    """Of one configuration: the stock model without weights, and what was made of it."""

    def __init__(self, config: Any, stated: dict[str, str]) -> None:
        self.name, self.stated, self.model = config.model_type, stated, empty_model(config)
        self.base: str = self.model.base_model_prefix
        self.modules = dict(self.model.named_modules())
        self.heads: int = config.num_attention_heads
        self.shared: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.rules: dict[str, Rule] = {}  # by pattern

    def plan(self) -> Plan:
        from transformers.modeling_layers import GenericForSequenceClassification

        for pattern, style in self.stated.items():
            self._read(f"{self.base}.{pattern}", style)
        self._check_pairs()
        self._add_vocabulary()
        for path in paths_to_decide(self.model):
            if not any(fnmatchcase(path, pattern) for pattern in self.rules):
                self._add_rest(path)
        return Plan(
            tuple(self.rules.values()),
            local=tuple(self._counts()),
            reads_last_token=isinstance(self.model, GenericForSequenceClassification),
        )

    def _refuse(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"transformers' plan for {self.name} cannot be kept: {what}; give a plan of your own (--plan FILE)"
        )

    def _read(self, pattern: str, style: str) -> None:
        """The rule for a pattern of transformers' plan; none if this model has no such layer."""
        for path in (path for path in self.modules if fnmatchcase(path, pattern)):
            cut = self._cut(path, pattern, style)
            known = self.rules.setdefault(pattern, Rule(pattern, cut, VECTOR if cut is Cut.REPLICATED else ""))
            if known.cut is not cut:
                raise self._refuse(
                    f"{pattern} is {known.cut.name.lower()} in one layer and {cut.name.lower()} in another"
                )

    def _cut(self, path: str, pattern: str, style: str) -> Cut:
        if style in _WHOLE:
            return Cut.REPLICATED
        layer, part = self.modules[path], _part_of(path)
        if not isinstance(layer, nn.Linear) or style not in _COLUMN + _ROW or part is None:
            raise self._refuse(f"{pattern} is {style}, and a {type(layer).__name__}")
        if part == "feed-forward":
            return Cut.DOWN if style in _ROW else Cut.UP
        width = layer.in_features if style in _ROW else layer.out_features
        by_query, by_key = (width == count * self._head_size(path) for count in (self.heads, self.shared))
        if style in _ROW and by_query:
            return Cut.ATTENTION_OUTPUT
        name = path.rpartition(".")[2]
        if style in _COLUMN and by_key and re.match("[kv]_", name):
            return Cut.KEY_VALUE
        if style in _COLUMN and by_query and name.startswith("q_"):
            return Cut.QUERY
        raise self._refuse(
            f"{pattern} is {style} with {width} features, which are not those of {self.heads} heads or of "
            f"{self.shared} key/value heads alone"
        )

    def _head_size(self, path: str) -> int:
        attention = self.modules[path.rpartition(".")[0]]
        found = getattr(attention, "head_dim", None)
        if not isinstance(found, int):
            raise self._refuse(f"{type(attention).__name__} does not say how large a head is")
        return found

    def _check_pairs(self) -> None:
        """What is cut by output features must be what is put together by input features; a gate may be fused in."""
        for parent, layers in self._cut_layers():
            cuts = {self.rules[pattern].cut for _, pattern in layers}
            if _part_of(f"{parent}.") == "attention":
                if cuts - {Cut.REPLICATED} != {Cut.QUERY, Cut.KEY_VALUE, Cut.ATTENTION_OUTPUT}:
                    raise self._refuse(f"it does not split query, key, value and output of {parent}")
                continue
            taken = {layer.in_features for layer, pattern in layers if self.rules[pattern].cut is Cut.DOWN}
            for layer, pattern in layers:
                if self.rules[pattern].cut is Cut.DOWN or taken == {layer.out_features}:
                    continue
                gathered = self.stated[pattern.removeprefix(f"{self.base}.")] == "colwise_gather_output"
                if not gathered or taken != {layer.out_features // 2}:
                    raise self._refuse(f"{pattern} has {layer.out_features} features, which no layer takes")
                self.rules[pattern] = Rule(pattern, Cut.GATE_UP)

    def _cut_layers(self) -> Iterator[tuple[str, list[tuple[Any, str]]]]:
        """For each attention and feed-forward its cut linear layers, with the patterns that found them."""
        found: dict[str, list[tuple[Any, str]]] = {}
        for path, module in self.modules.items():
            for pattern in self.rules:
                if isinstance(module, nn.Linear) and fnmatchcase(path, pattern):
                    found.setdefault(path.rpartition(".")[0], []).append((module, pattern))
        if not found:
            raise self._refuse("none of its patterns matches a layer")
        yield from found.items()

    def _add_vocabulary(self) -> None:
        table: Any = self.model.get_input_embeddings()
        path = next(path for path, module in self.modules.items() if module is table)
        looks_up = type(table).forward is nn.Embedding.forward or scale_of(table) is not None
        if looks_up and table.num_embeddings > table.embedding_dim:  # else an all-reduce moves more than it saves
            self.rules[path] = Rule(path, Cut.VOCAB)
        else:
            self.rules[path] = Rule(path, Cut.REPLICATED, SMALL)

    def _add_rest(self, path: str) -> None:
        """What transformers' plan does not mention stays whole, but a norm over all heads is cut like them."""
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        parent, _, leaf = path.rpartition(".")
        layer = self.modules[path if path in self.modules else parent]
        shapes = [p.shape for n, p in layer.named_parameters(recurse=False) if path in self.modules or n == leaf]
        vectors = all(len(shape) == 1 for shape in shapes)
        if _part_of(path) != "attention" or not path.startswith(self.base):
            outside = not path.startswith(f"{self.base}.")
            why = HEAD if outside else VECTOR if vectors else LEFT_WHOLE
            self.rules[pattern] = Rule(pattern, Cut.REPLICATED, why)
            return
        size = self._head_size(path)
        of_one, of_all, of_shared = (all(s == (n * size,) for s in shapes) for n in (1, self.heads, self.shared))
        if of_one:
            self.rules[pattern] = Rule(pattern, Cut.REPLICATED, ONE_FOR_ALL)
        elif of_all or of_shared:
            cut = Cut.QUERY_NORM if of_all and not (of_shared and leaf.startswith("k")) else Cut.KEY_VALUE_NORM
            self.rules[pattern] = Rule(pattern, cut)
        else:
            raise self._refuse(f"it does not mention {pattern}, {' and '.join(str(list(s)) for s in shapes)}")

    def _counts(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Where attention modules count heads."""
        found = {}
        for path, module in self.modules.items():
            names = tuple(name for name in _HEAD_COUNTS if name in vars(module))
            if names and _part_of(f"{path}.") == "attention":
                found[re.sub(r"\.\d+(?=\.|$)", ".*", path)] = names
        yield from found.items()


def _part_of(path: str) -> str | None:
    """Whether a layer is in attention or in a feed-forward, by the name of the module that it belongs to."""
    parent = path.split(".")[-2] if "." in path else ""
    if re.search("attn|attention", parent) and "linear" not in parent:
        return "attention"
    return "feed-forward" if re.search("mlp|ffn|feed_forward", parent) else None
