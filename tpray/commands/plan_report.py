"""What `tpray doctor MODEL` says: how a model would be sharded, and what each rank would hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tpray.artifacts.folder import Artifact
from tpray.artifacts.manifest import MANIFEST_FILE
from tpray.artifacts.resolve import find_model
from tpray.config import ModelConfig, ParallelConfig
from tpray.errors import ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.plan import Cut, Rule, Split, Unit
from tpray.parallel_layers.shard import apply_plan, decide, empty_model
from tpray.platforms.topology import Topology


@dataclass(frozen=True)
class PlanLine:
    """One rule of a model's plan, and the layers that it decides on.

    layers: how many. whole_bytes: of their parameters in float32, together. rank_bytes: of the largest share.
    """

    pattern: str
    how: str
    layers: int
    whole_bytes: int
    rank_bytes: int
    why: str


def explain_plan(model: ModelConfig, tp: int) -> list[PlanLine]:
    """How ``model`` is sharded over ``tp`` ranks; reads its configuration, and no weight.

    Raises:
        TprayError: as `find_model` does.
    """
    checkpoint = find_model(model, Topology.of(ParallelConfig(tp=tp)))
    if isinstance(checkpoint, Artifact):
        raise ConfigError(f"{model.source} is traced already; its plan is in {MANIFEST_FILE}")
    whole = empty_model(checkpoint.config)
    layers: dict[Rule, list[str]] = {}
    for decision in decide(whole, checkpoint.plan):
        layers.setdefault(decision.rule, []).append(decision.path)
    shards = []
    for rank in range(tp):
        shards.append(empty_model(checkpoint.config))
        with parallel_state.use(rank, tp):
            apply_plan(shards[rank], checkpoint.plan, torch.float32)

    def size(model: nn.Module, paths: list[str]) -> int:
        return sum(_bytes(model, path) for path in paths)

    return [
        PlanLine(
            rule.pattern, _how(rule.cut), len(paths), size(whole, paths), max(size(s, paths) for s in shards), rule.why
        )
        for rule, paths in layers.items()
    ]


def _how(cut: Cut) -> str:
    if cut is Cut.REPLICATED:
        return "whole on every rank"
    if cut is Cut.VOCAB:
        return "by vocabulary, all-reduce after"
    by = {Unit.HEAD: "heads", Unit.KEY_VALUE_HEAD: "key/value heads", Unit.FEATURE: "features"}[cut.unit]
    fused = f", {cut.parts} layers in one" if cut.parts > 1 else ""
    return f"{cut.split.value}-parallel by {by}{', all-reduce after' if cut.split is Split.ROW else ''}{fused}"


def _bytes(model: nn.Module, path: str) -> int:
    parent_path, _, leaf = path.rpartition(".")
    found = getattr(model.get_submodule(parent_path), leaf)
    return found.nbytes if isinstance(found, torch.Tensor) else sum(p.nbytes for p in found.parameters())
