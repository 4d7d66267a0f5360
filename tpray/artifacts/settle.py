"""Settle what a configuration leaves open: the degree and the number of groups, before anything is started."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from tpray.artifacts.folder import MODEL_DIR, is_artifact
from tpray.artifacts.manifest import Manifest, read_manifest
from tpray.artifacts.resolve import check_dtype
from tpray.artifacts.signature import check_signature
from tpray.artifacts.sizes import bytes_in
from tpray.artifacts.store import directory_of
from tpray.config import AUTO, Goal, ModelConfig, ServeConfig, local_directory
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.checkpoint import Checkpoint, find_checkpoint
from tpray.platforms import platform_for
from tpray.platforms.base import Platform
from tpray.platforms.choose import (
    Asked,
    Choice,
    Layout,
    MachineFacts,
    ModelFacts,
    candidates,
    check_memory,
    choose,
    choose_cores,
    has_small_layers,
    warn_of_cores,
)
from tpray.platforms.measured import ROWS, step_seconds
from tpray.platforms.topology import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """A configuration in which nothing is left open that decides on processes.

    topology: of each group. replicas: how many there are; with autoscaling, at first.
    """

    config: ServeConfig
    topology: Topology
    replicas: int

    @property
    def why(self) -> str:
        """The degree and the number of groups were chosen, in a sentence; empty: the user has said both."""
        return self.topology.why


def settle(config: ServeConfig, runs_here: bool = True) -> Settled:
    """Choose what the user left open, for ``config.goal``, and refuse what this machine cannot hold.

    A traced model, given as one, keeps its degree. It may measure for a second or two, once for each shape of model.

    Args:
        runs_here: whether all groups run on this machine; else nothing is refused for its sake, and where the user has
            said both the degree and the number of groups, the model need not be here either.

    Raises:
        TprayError: the model cannot be found; the machine has not the memory or the cores for what was asked.
    """
    parallel = config.parallel
    platform = platform_for(parallel.runtime)
    machine = platform.facts(parallel)
    asked = _asked(config)
    if asked.tp is not None and config.model.plan is None:
        _check_degree(config.model.source, asked.tp)
    if asked.tp is not None and asked.replicas is not None and (asked.replicas == 1 or not runs_here):
        width = asked.cores_per_rank or platform.cores_per_rank(asked.tp)
        choice = Choice(Layout(asked.replicas, asked.tp, width))
    else:
        model, traced_tp = _facts(config.model, platform)
        if asked.tp is None and traced_tp is not None:
            asked = replace(asked, tp=traced_tp)
        said_both = asked.tp is not None and asked.replicas is not None
        choice = _choose(model, machine, platform, config.goal, asked)
        choice = Choice(choice.layout) if said_both else choice
        if runs_here:
            check_memory(model, machine, choice.layout)
    layout = choice.layout
    pinned_here = runs_here and not platform.ray_assigns_cores
    if pinned_here and layout.cores > machine.cores:
        traced = _traced_degree(config.model.source)
        if traced in (None, layout.tp):  # else it is refused, as what has another degree
            log.warning("%s", warn_of_cores(machine.cores, layout, config.goal, traced is not None))
    chosen = {"parallel": parallel.model_copy(update={"tp": layout.tp}), "replicas": layout.replicas}
    settled = config.model_copy(update=chosen)
    return Settled(settled, Topology.of(settled.parallel, layout.replicas, choice.reason), layout.replicas)


def _asked(config: ServeConfig) -> Asked:
    """What the user has said; that there is one group, if it is to be fast."""
    tp, replicas = config.parallel.tp, config.replicas
    single = config.autoscaling is not None or config.goal == "latency"
    return Asked(
        None if tp == AUTO else tp,
        replicas if replicas != AUTO else 1 if single else None,
        config.parallel.cores_per_rank,
    )


def cheapest_degree(source: str | None) -> int:
    """The degree of a group that costs least to start: that of a traced model, else a single rank."""
    return _traced_degree(source) or 1


def _traced_degree(source: str | None) -> int | None:
    """What a traced model was traced for; None: ``source`` is a checkpoint."""
    directory = directory_of(source)
    return read_manifest(directory, Manifest).tp if is_artifact(directory) else None


def _choose(model: ModelFacts, machine: MachineFacts, platform: Platform, goal: Goal, asked: Asked) -> Choice:
    if platform.ray_assigns_cores:
        return choose_cores(model, machine, goal, asked)
    layouts = candidates(model, machine, goal, asked)
    measures = len(layouts) > 1 and not has_small_layers(model)
    figures = step_seconds(model, layouts, ROWS if goal == "throughput" else 1) if measures else {}
    return choose(model, machine, goal, asked, figures)


def _facts(model: ModelConfig, platform: Platform) -> tuple[ModelFacts, int | None]:
    """What of the model decides, and the degree that it was traced for."""
    directory = directory_of(model.source)
    name = model.source or "the embedded demo"
    check_signature(directory, model.verify_key)
    if is_artifact(directory):
        manifest = read_manifest(directory, Manifest)
        check_dtype(manifest, platform, f"the artifact {name}")
        sizes = _sizes(Checkpoint(name, directory / MODEL_DIR))
        return ModelFacts(name, manifest.weight_bytes, manifest.dtype, **sizes), manifest.tp
    checkpoint = find_checkpoint(directory if model.source is None else model.source, model.revision)
    dtype = platform.choose_dtype(model.dtype)
    return ModelFacts(name, bytes_in(checkpoint, dtype), dtype, **_sizes(checkpoint)), None


NAMES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
}
"""What config.json calls them; transformers translates where an architecture has names of its own."""


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Of a layer, and how many there are; all 0 where an architecture has no such sizes."""
    stored = checkpoint.stored_config()
    sizes = _known({name: stored.get(key) for name, key in NAMES.items()})
    if sizes is None:
        found = {name: getattr(checkpoint.config, key, None) for name, key in NAMES.items()}
        found["intermediate"] = found["intermediate"] or 4 * (found["hidden"] or 0)
        sizes = _known(found)
    return sizes or dict.fromkeys(NAMES, 0)


def _known(sizes: Mapping[str, Any]) -> dict[str, int] | None:
    """These sizes, if all of them are some."""
    return dict(sizes) if all(isinstance(size, int) and size > 0 for size in sizes.values()) else None


def _check_degree(source: str | None, tp: int) -> None:
    """Refuse a degree that the configuration of a checkpoint on this machine rules out, before anything is started.

    What only transformers knows, `tpray.artifacts.resolve.check` refuses.

    Raises:
        DegreeError: it leaves a rank without an attention head.
    """
    directory = local_directory(source)
    if not (directory / "config.json").is_file():
        return
    stored = Checkpoint(source or "", directory).stored_config()
    plan, heads = PLANS.get(str(stored.get("model_type"))), stored.get("num_attention_heads")
    if plan is not None and isinstance(heads, int):
        plan.check_degree(SimpleNamespace(**stored), tp)
