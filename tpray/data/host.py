"""A group that an actor of Ray Data asks, in a placement group of its own, on whichever node has room.

Ray Data's actor takes no CPU, and may be on any node; the wire between a group and its owner does not cross nodes. So
the actor makes the placement group, and in it the group's owner.

Ray ends the owner with the actor, however that ends. The actor removes the placement group where Ray Data lets it go in
order, which deletes its class's object; for one that was killed see `tpray.data.room`.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html, ray/data/_internal/execution/operators/
actor_pool_map_operator.py (``__ray_shutdown__``)
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpray.artifacts.settle import cheapest_degree
from tpray.config import AUTO, SPARE_CPUS, ParallelConfig, local_directory
from tpray.data.answers import Asking, asked
from tpray.data.room import place
from tpray.errors import ConfigError, GroupError, InputError, ItemError, RankError
from tpray.group.nodes import NODE_PATIENCE_S
from tpray.platforms.topology import Topology
from tpray.serving.handle import as_there
from tpray.serving.local import load
from tpray.tokenizer import Item

if TYPE_CHECKING:
    from tpray.serving.local import LocalClassifier

log = logging.getLogger(__name__)

CALLS = 16
"""How many calls may be under way at a group's owner; those of more batches wait."""
STARTS = 3
"""How often a group is started whose rank dies before it is up."""
RESTARTS = 3
"""How often a group's owner is started again. A group restarts its ranks by itself, which is not counted here."""
OPTIONS = set(inspect.signature(load).parameters) - {"out", "progress", "executor", "trace_only", "in_process"}
"""The arguments of `tpray.load` that a group here takes too."""


class GroupHost:
    """The owner of a group: a Ray actor that any number of callers ask at once.

    Args:
        options: of `tpray.load`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options, self._loading = options, threading.Lock()
        self._loaded: LocalClassifier | None = None

    def _classifier(self) -> LocalClassifier:
        """Brought up by the first call, so that an error of it reaches the caller as it is.

        A rank may die while it starts too, which must not fail a dataset of which much is done.
        """
        with self._loading:
            for left in reversed(range(STARTS)):
                if self._loaded is not None:
                    break
                try:
                    self._loaded = load(**self._options)
                except RankError as e:
                    if not left:
                        raise
                    log.warning("a group is started again: %s", e)
            assert self._loaded is not None, "or an error was raised"
            return self._loaded

    def task(self) -> str:
        """What the model does; see `tpray.parallel_layers.tasks`."""
        return self._classifier().task

    def answer(self, items: Sequence[Item], how: Asking) -> list[list[dict[str, Any]] | ItemError]:
        """The answer of each item, or its error; see `tpray.data.answers.asked`."""
        classifier, refused = self._classifier(), dict[int, ItemError]()
        for number, item in enumerate(items):
            try:
                classifier.check(item, how.truncate, how.chunks)
            except InputError as e:
                refused[number] = e
        answers = asked(classifier, (item for number, item in enumerate(items) if number not in refused), how)
        return [refused[number] if number in refused else next(answers) for number in range(len(items))]

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What ``work`` makes of the classifier and the arguments."""
        return work(self._classifier(), *arguments)


class Hosted:
    """A group that was started from here, and ends with this process or object.

    Args:
        options: of `tpray.load`, settled; see `settled`.
        patience_s: how long to wait for room, seconds; longer only while an autoscaler starts nodes.

    Raises:
        TprayError: whatever keeps it from starting; `PlacementError`: there is no room for it.
    """

    def __init__(self, options: Mapping[str, Any], patience_s: float = NODE_PATIENCE_S) -> None:
        self._placement = place(topology_of(options), patience_s)
        # No CPU of its own: what it tokenises is little beside what its ranks compute.
        host: Any = ray.remote(GroupHost)
        self._actor = host.options(
            num_cpus=0,
            max_concurrency=CALLS,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=0),
        ).remote(options)  # fmt: skip
        self.task = str(self._get(self._actor.task.remote()))

    async def answer(self, items: Sequence[Item], how: Asking) -> list[list[dict[str, Any]] | ItemError]:
        """See `GroupHost.answer`.

        Raises:
            GroupError: the group could not be brought back.
        """
        with _own_errors():
            answers: list[list[dict[str, Any]] | ItemError] = await self._actor.answer.remote(items, how)
            return answers

    def __del__(self) -> None:
        with suppress(Exception):  # Ray may have ended before, or nothing was placed
            remove_placement_group(self._placement)

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """See `GroupHost.run`."""
        return self._get(self._actor.run.remote(work, *arguments))

    @staticmethod
    def _get(reference: Any) -> Any:
        with _own_errors():
            return ray.get(reference)


def settled(options: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    """The options of `tpray.load` with what they leave open of the degree and the cores.

    Args:
        replicas: how many groups share a machine's cores, where ``cores`` does not say how many a rank has.

    Raises:
        ConfigError: there is no such option. DegreeError: the degree cannot be.
    """
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise ConfigError(f"there is no option {unknown[0]!r}: those of a group are {', '.join(sorted(OPTIONS))}")
    model, tp = options.get("model"), options.get("tp", AUTO)
    degree = cheapest_degree(None if model is None else str(model)) if tp == AUTO else tp
    topology = topology_of({**options, "tp": degree}, replicas)
    return {**from_here(options), "tp": topology.tp, "cores": topology.cores_per_rank}


def leaving_a_cpu(options: Mapping[str, Any], replicas: int, cpus: float, may_shrink: bool) -> dict[str, Any]:
    """Settled options of groups beside which Ray Data's own tasks, that read and write, find one of ``cpus`` CPUs.

    Else they would wait for ever: groups keep what they have.

    Args:
        cpus: of all nodes. may_shrink: whether a rank may get fewer cores than ``options`` say.

    Raises:
        ConfigError: the groups would take all.
    """
    topology = topology_of(options)
    needed = replicas * topology.resources()["CPU"]
    if cpus - needed >= 1 or needed > cpus:  # more: the groups wait, and say so
        return dict(options)
    cores = int(cpus - 1) // (replicas * topology.tp)
    if not may_shrink or topology.on_assigned_cores or cores < 1:
        raise ConfigError(
            f"the groups would take {needed:g} of the {cpus:g} CPUs that this Ray hands out, and Ray Data's own tasks, "
            f"which read and write, want one each: ask for fewer, or start Ray with more, as in ray.init(num_cpus="
            f"{needed + SPARE_CPUS:g})"
        )
    return {**options, "cores": cores}


def from_here(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `tpray.load` with paths that name the same whatever folder a process of Ray's is in."""
    made = dict(options)
    for name in ("plan", "chat_template", "verify_key"):
        if isinstance(given := made.get(name), (str, Path)):
            made[name] = Path(given).expanduser().absolute()
    if made.get("model") is not None and (directory := local_directory(str(made["model"]))).exists():
        made["model"] = str(directory.absolute())
    return made


def topology_of(options: Mapping[str, Any], replicas: int = 1) -> Topology:
    """How a group with these options of `tpray.load` lies on its node."""
    names = {"tp": "tp", "cores": "cores_per_rank"}
    names |= {name: name for name in ("runtime", "instance_family", "neuron_layout", "lnc")}
    parallel = ParallelConfig(**{own: options[name] for name, own in names.items() if name in options})
    return Topology.of(parallel, replicas)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what the group's owner has raised as it was there."""
    try:
        yield
    except RayTaskError as e:
        raise as_there(e) from None
    except RayActorError as e:
        raise GroupError(f"the process that owns a group has ended, and not come back: {e}") from e
