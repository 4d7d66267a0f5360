"""What `tpray doctor MODEL` says: how a model would be sharded, and what each rank would hold."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from tpray.artifacts.folder import Artifact
from tpray.artifacts.manifest import MANIFEST_FILE
from tpray.artifacts.resolve import check_model, find_files
from tpray.artifacts.sizes import BYTES
from tpray.config import ModelConfig, ParallelConfig
from tpray.errors import ConfigError, DegreeError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.plan import Cut, Plan, Rule, Split, Unit
from tpray.parallel_layers.shard import apply_plan, decide
from tpray.parallel_layers.stock import empty_model
from tpray.platforms.topology import Topology

DEGREES = (1, 2, 4, 8)
"""Of which the report says what a rank would hold, besides the one asked for."""


@dataclass(frozen=True)
class PlanLine:
    """One rule of a model's plan, and the layers that it decides on.

    layers: how many. whole_bytes: of their parameters, together. rank_bytes: of the largest share.
    """

    pattern: str
    how: str
    layers: int
    whole_bytes: int
    rank_bytes: int
    why: str


@dataclass(frozen=True)
class PlanReport:
    """How a model would be sharded.

    dtype: that bytes are counted in. by_degree: tp -> the bytes of weights that the fullest rank would hold.
    """

    lines: list[PlanLine]
    tp: int
    dtype: str
    by_degree: dict[int, int]


def explain_plan(model: ModelConfig, tp: int) -> PlanReport:
    """How ``model`` is sharded over ``tp`` ranks; reads its configuration, and no weight.

    Raises:
        TprayError: as `find_model` does, but for what does not fit this machine.
    """
    topology = Topology.of(ParallelConfig(tp=tp))
    checkpoint = find_files(model, topology)
    if isinstance(checkpoint, Artifact):
        raise ConfigError(f"{model.source} is traced already; its plan is in {MANIFEST_FILE}")
    check_model(checkpoint, model, topology)
    whole = empty_model(checkpoint.config)
    layers: dict[Rule, list[str]] = {}
    for decision in decide(whole, checkpoint.plan):
        layers.setdefault(decision.rule, []).append(decision.path)
    dtype = topology.platform.choose_dtype(model.dtype)
    shards = [_shard(whole, checkpoint.plan, rank, tp) for rank in range(tp)]

    def size(model: nn.Module, paths: list[str]) -> int:
        return sum(_weights(model, path) for path in paths) * BYTES[dtype]

    lines = [
        PlanLine(
            rule.pattern, _how(rule.cut), len(paths), size(whole, paths), max(size(s, paths) for s in shards), rule.why
        )
        for rule, paths in layers.items()
    ]
    everything = [path for paths in layers.values() for path in paths]
    by_degree = {}
    for degree in sorted({*DEGREES, tp}):
        with suppress(DegreeError):
            # Neighbours differ by one head at most, and the last rank has the most.
            fullest = [_shard(whole, checkpoint.plan, rank, degree) for rank in {0, degree - 1}]
            by_degree[degree] = max(size(shard, everything) for shard in fullest)
    return PlanReport(lines, tp, dtype, by_degree)


def _shard(whole: nn.Module, plan: Plan, rank: int, tp: int) -> nn.Module:
    """A rank's part of a model on the meta device, which stays whole."""
    shard = copy.deepcopy(whole)
    with parallel_state.use(rank, tp):
        apply_plan(shard, plan, torch.float32)
    return shard


def _how(cut: Cut) -> str:
    if cut is Cut.REPLICATED:
        return "whole on every rank"
    if cut is Cut.VOCAB:
        return "by vocabulary, all-reduce after"
    by = {Unit.HEAD: "heads", Unit.KEY_VALUE_HEAD: "key/value heads", Unit.FEATURE: "features"}[cut.unit]
    if cut.split is Split.NORM:
        return f"by {by}, all-reduce of one number of each token"
    fused = f", {cut.parts} layers in one" if cut.parts > 1 else ""
    return f"{cut.split.value}-parallel by {by}{', all-reduce after' if cut.split is Split.ROW else ''}{fused}"


def _weights(model: nn.Module, path: str) -> int:
    """How many weights a layer, or a parameter, has."""
    parent_path, _, leaf = path.rpartition(".")
    found = getattr(model.get_submodule(parent_path), leaf)
    return found.numel() if isinstance(found, torch.Tensor) else sum(p.numel() for p in found.parameters())
