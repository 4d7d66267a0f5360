"""Choose how many groups there are, of how many ranks, on how many cores each: pure functions.

`choose` takes what is known of the model and of the machine, and what a short measurement has said, and gives a layout
with the reason for it. What the user says stays as it is. Who asks and measures is `tpray.artifacts.settle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tpray.config import Goal
from tpray.errors import ConfigError, DegreeError

CLEARLY = 0.95
"""A layout must need at most this share of the time of one that is preferred to it: for latency one of fewer ranks, for
throughput one of more groups, which wait for nobody and tokenise side by side."""

RANK_BYTES = 450 << 20
"""Memory of a rank's process besides its weights; ``python -m tests.bench.memory`` measures it."""
REPLICA_BYTES = 450 << 20
"""The same of the replica, which has none."""
COPIES = 1.15
"""How many times its weights a rank takes while it starts, besides `RANK_BYTES`."""

MOST_GROUPS = 16
MOST_RANKS = 8
"""Of CPU cores, unless the user says: each is a process, and costs as much to start and to hold."""


@dataclass(frozen=True, order=True)
class Layout:
    """So many groups, of so many ranks each, on so many cores each."""

    replicas: int
    tp: int
    cores_per_rank: int

    @property
    def cores(self) -> int:
        """Of all ranks together."""
        return self.replicas * self.tp * self.cores_per_rank

    def __str__(self) -> str:
        cores = f"{self.cores_per_rank} core{'s' if self.cores_per_rank > 1 else ''}"
        group = f"tp {self.tp} on {cores}{' each' if self.tp > 1 else ''}"
        return f"{self.replicas} groups of {group}" if self.replicas > 1 else group


@dataclass(frozen=True)
class Asked:
    """What the user has said; None: nothing."""

    tp: int | None = None
    replicas: int | None = None
    cores_per_rank: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What of a model decides.

    name: for messages. weight_bytes: in the dtype that it runs in, all ranks together. dtype: ``auto`` resolved.
    heads: of attention, the most ranks that a group can have. length: of a row, at most. All 0: not known.
    """

    name: str
    weight_bytes: int
    dtype: str
    hidden: int
    intermediate: int
    heads: int
    layers: int
    length: int = 512


@dataclass(frozen=True)
class MachineFacts:
    """What of a machine decides.

    cores: how many can be used. available_bytes: of memory, for new processes. core_bytes: memory of an accelerator's
    core; None: it has none of its own. degrees: over how many cores a collective runs; None: over any number.
    """

    cores: int
    available_bytes: int
    core_bytes: int | None = None
    degrees: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Choice:
    """A layout, and why, in a sentence; empty: there was nothing to choose."""

    layout: Layout
    reason: str = ""


SMALL_WEIGHTS = 1_000_000
"""A layer of fewer weights takes one core less time for a row than two collectives do: nothing need be measured.

By ``python -m tests.bench``: two ranks took longer than one for the demo (0.2 M), and less for a layer of 1.8 M.
"""


def layer_weights(model: ModelFacts) -> int:
    """How many weights the linear layers of one layer of an encoder have."""
    return 4 * model.hidden**2 + 2 * model.hidden * model.intermediate


def has_small_layers(model: ModelFacts) -> bool:
    """Whether sharing a layer costs more than it gains, whatever the cores; so it is of those that are not known."""
    return layer_weights(model) < SMALL_WEIGHTS


Figures = Mapping[Layout, float]
"""Seconds that a group of the layout takes for a step, all groups of it working at once."""


def memory_of(model: ModelFacts, layout: Layout) -> int:
    """What all groups of a layout take of this machine's memory while they start, about, bytes."""
    group = COPIES * model.weight_bytes + layout.tp * RANK_BYTES + REPLICA_BYTES
    return int(layout.replicas * group)


def candidates(model: ModelFacts, machine: MachineFacts, goal: Goal, asked: Asked) -> list[Layout]:
    """The layouts on CPU cores that fit what is asked and the memory; those of the fewest processes first.

    One at least: where nothing fits, what comes nearest to it.
    """
    found = _layouts(model, machine, goal, asked)
    fitting = [one for one in found if one.cores <= machine.cores]
    fitting = [one for one in fitting if memory_of(model, one) <= machine.available_bytes]
    return fitting or found[:1]


def _layouts(model: ModelFacts, machine: MachineFacts, goal: Goal, asked: Asked) -> list[Layout]:
    """What `candidates` takes its own from: whether it fits or not, in the same order."""
    degrees = [asked.tp] if asked.tp else _powers(min(model.heads, machine.cores, MOST_RANKS))
    if asked.replicas:
        counts = [asked.replicas]
    else:
        counts = _powers(min(machine.cores, MOST_GROUPS)) if goal == "throughput" else [1]
    found = []
    for replicas in counts:
        for tp in degrees:
            # Groups of several ranks are for latency: a group for each core needs no collective at all.
            if replicas > 1 and tp > 1 and not (asked.tp or asked.replicas):
                continue
            width = asked.cores_per_rank or max(1, machine.cores // (replicas * tp))
            found.append(Layout(replicas, tp, width))
    return sorted(found, key=lambda layout: (layout.replicas * layout.tp, layout))


def _powers(limit: int) -> list[int]:
    """1, 2, 4 and so on, and the limit."""
    return sorted({1 << bit for bit in range(limit.bit_length())} | {max(1, limit)})


def choose(model: ModelFacts, machine: MachineFacts, goal: Goal, asked: Asked, figures: Figures) -> Choice:
    """The layout on CPU cores that is fastest for ``goal``, of `candidates`.

    Args:
        figures: of the candidates; empty: they could not be measured. Then it is what has won in most measurements:
            a single rank for latency, for throughput a group for each core.
    """
    layouts = candidates(model, machine, goal, asked)
    if goal == "throughput":
        layouts.sort(key=lambda layout: (-layout.replicas, layout.tp))
    best = layouts[0]
    if not model.hidden:
        return Choice(best, f"{best}: the model's config.json does not say how large its layers are")
    if len(layouts) == 1:
        return Choice(best, f"{best}: {_only(model, machine, best, goal, asked)}")
    if has_small_layers(model):
        return Choice(
            best, f"{best}, for {goal}: layers of {layer_weights(model) / 1e6:.1f} M weights are not worth sharing"
        )
    if not all(layout in figures for layout in layouts):
        return Choice(best, f"{best}, for {goal}: what is fastest as a rule; this machine is too busy to measure")
    cost = {layout: figures[layout] / (layout.replicas if goal == "throughput" else 1) for layout in layouts}
    for layout in layouts[1:]:
        if cost[layout] < CLEARLY * cost[best]:
            best = layout
    others = sorted((layout for layout in layouts if layout != best), key=cost.__getitem__)
    what = f"{cost[best] * 1e3:.3g} ms a row" if goal == "latency" else f"{1 / cost[best]:.3g} steps a second"
    against = ", ".join(
        f"{cost[other] * 1e3:.3g} with {other}" if goal == "latency" else f"{1 / cost[other]:.3g} with {other}"
        for other in others[:3]
    )
    return Choice(best, f"{best}, for {goal}: {what} by a short measurement in {model.dtype}, {against}")


def _only(model: ModelFacts, machine: MachineFacts, layout: Layout, goal: Goal, asked: Asked) -> str:
    """Why there is no other candidate than ``layout``."""
    available = f"of memory, and {gib(machine.available_bytes)} are available"
    if layout.cores > machine.cores:
        return f"as was asked, though it wants {layout.cores} CPU cores and {machine.cores} can be used"
    if memory_of(model, layout) > machine.available_bytes:
        return f"it comes nearest to the memory: it takes {gib(memory_of(model, layout))} {available}"
    others = [one for one in _layouts(model, machine, goal, asked) if one != layout and one.cores <= machine.cores]
    if others:
        return f"{others[0]} would take {gib(memory_of(model, others[0]))} {available}"
    if machine.cores == 1:
        return "one core can be used here"
    return f"the only layout on {machine.cores} cores that fits what was asked"


def choose_cores(model: ModelFacts, machine: MachineFacts, goal: Goal, asked: Asked) -> Choice:
    """The layout on cores with memory of their own: the smallest degree whose weights fit, and with ``throughput`` as
    many groups as there are cores for.

    Raises:
        DegreeError: no degree does.
    """
    core_bytes, degrees = machine.core_bytes or 0, machine.degrees or (1,)
    able = [tp for tp in degrees if tp <= max(1, model.heads) and (not machine.cores or tp <= machine.cores)]
    fitting = [tp for tp in able if not core_bytes or COPIES * model.weight_bytes / tp <= core_bytes]
    if asked.tp is None and not fitting:
        largest = max(able, default=1)
        raise DegreeError(
            f"the weights of {model.name} are {gib(model.weight_bytes)} in {model.dtype}, and the {largest} cores that "
            f"a group can have here hold {gib(largest * core_bytes)}: use a smaller model, or an instance with more "
            "cores"
        )
    tp = asked.tp or fitting[0]
    replicas = asked.replicas or (max(1, machine.cores // tp) if goal == "throughput" else 1)
    layout = Layout(replicas, tp, asked.cores_per_rank or 1)
    why = f"the smallest degree whose share of {gib(model.weight_bytes)} fits a core's {gib(core_bytes)}"
    if asked.tp is not None or not core_bytes:
        why = "as was asked" if asked.tp is not None else "the family of the cores, and so their memory, is not known"
    if replicas > 1 and asked.replicas is None:
        why += f"; {replicas} groups are what {machine.cores} cores hold"
    return Choice(layout, f"{layout}: {why}")


def check_memory(model: ModelFacts, machine: MachineFacts, layout: Layout) -> None:
    """Refuse several groups that this machine's memory cannot hold; one is refused where its files are found.

    Raises:
        ConfigError: with what is needed, what there is and how many groups fit.
    """
    needed = memory_of(model, layout)
    if layout.replicas > 1 and needed > machine.available_bytes:
        group = needed // layout.replicas
        raise ConfigError(
            f"{layout.replicas} groups of {model.name} take {gib(needed)} of memory, {gib(group)} each, and this "
            f"machine has {gib(machine.available_bytes)} available: use --replicas "
            f"{max(1, machine.available_bytes // group)}, or a machine with more"
        )


def warn_of_cores(cores: int, layout: Layout, goal: Goal, traced: bool = False) -> str:
    """What to say of a layout of more ranks and threads than there are CPU cores to use.

    Args:
        traced: the model was traced for this degree, and can have no other as it is.

    Raises:
        DegreeError: it is for throughput, of which sharing cores gives nothing.
    """
    tp = min(layout.tp, cores)
    replicas = max(1, min(layout.replicas, cores // tp))
    again = traced and tp < layout.tp
    fits = f"--replicas {replicas}" if traced else f"--tp {tp} --replicas {replicas}"
    if layout.cores_per_rank > 1:
        fits += f" --cores-per-rank {max(1, cores // (tp * replicas))}"
    ranks = layout.replicas * layout.tp
    wants = f"{ranks} rank{'s want' if ranks > 1 else ' wants'} {layout.cores} CPU cores and {cores} can be used here"
    advice = f"trace the model again with --tp {tp}, and use {fits}" if again else f"use {fits}"
    if goal == "throughput":
        raise DegreeError(f"{wants}: for throughput {advice}{'' if again else ', or leave these flags out'}")
    return f"{wants}: they share them; to be faster, {advice}"


def gib(size: int) -> str:
    """``1610612736`` -> ``"1.5 GiB"``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
