"""Where a group runs: one placement group, one bundle, one node.

The bundle carries the cores of the whole group, and the ranks and the group's owner share it: Ray then
either places all of them on one node or none. Inside a Serve replica the placement group is the replica's
own; elsewhere the group makes one, on the node of its owner, since the wire does not cross nodes.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html, accelerators.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpray.config import InstanceFamily, NeuronLayout, ParallelConfig, RuntimeName
from tpray.errors import ConfigError, PlacementError
from tpray.group.cores import cores_per_rank, usable_cores
from tpray.runtime.neuron_env import detect, instance_family

log = logging.getLogger("tpray.group.placement")

STRATEGY = "STRICT_PACK"
NEURON_CORES = "neuron_cores"
"""Ray's resource. It counts logical cores, gives whole ones, and their ids to the actors."""


@dataclass(frozen=True)
class Layout:
    """How a group lies on its node: ``tp`` ranks of ``width`` cores each. family, lnc: see `NeuronPlace`."""

    tp: int
    runtime: RuntimeName
    width: int
    processes: NeuronLayout = "process-per-rank"
    family: InstanceFamily | None = None
    lnc: int | None = None

    @classmethod
    def of(cls, parallel: ParallelConfig, replicas: int = 1) -> Layout:
        """What a configuration says, with what this machine is where it does not say.

        Raises:
            ConfigError: the runtime does not know the layout of processes.
        """
        runtime = detect() if parallel.runtime == "auto" else parallel.runtime
        if runtime == "neuron" and parallel.neuron_layout == "single-process":
            raise ConfigError("the single-process layout is neuron-xla's: use --neuron-layout process-per-rank")
        share = cores_per_rank(len(usable_cores()), parallel.tp * replicas) if runtime == "cpu" else 1
        width = parallel.cores_per_rank or share
        family = parallel.instance_family or instance_family()
        return cls(parallel.tp, runtime, width, parallel.neuron_layout, family, parallel.lnc)

    @property
    def on_neuron(self) -> bool:
        """Whether the ranks are on NeuronCores."""
        return self.runtime in ("neuron", "neuron-xla")

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""
        return 1 if self.on_neuron else self.width

    @property
    def ranks_of(self) -> list[range]:
        """The ranks of each process."""
        if self.on_neuron and self.processes == "single-process":
            return [range(self.tp)]
        return [range(rank, rank + 1) for rank in range(self.tp)]

    def bundle(self) -> dict[str, float]:
        """What the group takes from its node."""
        cpus = {"CPU": float(self.tp * self.threads)}
        return cpus | ({NEURON_CORES: float(self.tp * self.width)} if self.on_neuron else {})

    def options(self, ranks: range) -> dict[str, Any]:
        """Ray's options for the actor that holds ``ranks``."""
        neuron = {"resources": {NEURON_CORES: len(ranks) * self.width}} if self.on_neuron else {}
        return {"num_cpus": len(ranks) * self.threads} | neuron


def shortfall(layout: Layout, nodes: list[dict[str, Any]] | None = None) -> str | None:
    """Why no node could ever hold the group, in a sentence; None if one could. nodes: default, all that are alive."""
    found = [node["Resources"] for node in (ray.nodes() if nodes is None else nodes) if node["Alive"]]
    needs = layout.bundle()
    if any(all(has.get(name, 0.0) >= amount for name, amount in needs.items()) for has in found):
        return None
    names = {"CPU": "CPUs", NEURON_CORES: "NeuronCores"}
    wanted = " and ".join(f"{amount:g} {names[name]}" for name, amount in needs.items())
    each = {" and ".join(f"{has.get(name, 0.0):g} {names[name]}" for name in needs) for has in found}
    largest = " or ".join(sorted(each)) or "nothing"
    return (
        f"a group of {layout.tp} ranks with {layout.width} cores each needs {wanted} on one node, and no node of this "
        f"Ray has more than {largest}: ask for fewer, or start Ray with more"
    )


NODE_PATIENCE_S = 120.0
NODE_LIMIT_S = 900.0
"""How long to wait for a node that can hold a group: while no autoscaler starts one, and at the longest."""


def wait_for_node(layout: Layout) -> None:
    """Return when a node of this Ray could hold the group, were it idle; ask the autoscaler for one meanwhile.

    Without this a deployment whose group is too large for every node would wait for ever, and say so nowhere.

    Raises:
        PlacementError: none has come, and the message says what is wanted and what there is.
    """
    reason = shortfall(layout)
    if reason is None:
        return
    log.warning("%s; waiting for such a node", reason)
    demand = placement_group([layout.bundle()], strategy=STRATEGY)  # what an autoscaler goes by
    started = time.monotonic()
    try:
        while reason is not None:
            waited = time.monotonic() - started
            if waited > NODE_LIMIT_S or (waited > NODE_PATIENCE_S and not _nodes_are_coming()):
                raise PlacementError(f"{reason}; none has come in {waited:.0f} s")
            time.sleep(1)
            reason = shortfall(layout)
    finally:
        remove_placement_group(demand)


def _nodes_are_coming() -> bool:
    """Whether Ray's autoscaler is starting nodes.

    Version 2 reports to Ray's control store; version 1 leaves there what `ray status` prints.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import _internal_kv_get

    messages, private = cast(Any, autoscaler_pb2), cast(Any, ray)._raylet  # neither has types
    client = private.GcsClient(ray.get_runtime_context().gcs_address)
    try:
        state = messages.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10)).autoscaling_state
        if state.autoscaler_state_version:
            return bool(state.pending_instance_requests or state.pending_instances)
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
        return bool(report.get("pending_nodes") or report.get("pending_launches"))
    except Exception as e:  # noqa: BLE001  # Ray's own errors are private; the wait has a limit anyway
        log.warning("Ray does not say whether nodes are coming: %s", e)
        return True


class Placement:
    """A placement group that holds, or will hold, one group. ``own``: made here and removed here."""

    def __init__(self, group: PlacementGroup, own: bool) -> None:
        self._group, self.own = group, own

    @classmethod
    async def acquire(cls, layout: Layout) -> Placement:
        """The placement group of the replica that calls, or a new one on this node.

        Raises:
            PlacementError: this node could never hold the group.
        """
        current = get_current_placement_group()
        return cls.make(layout) if current is None else cls(current, own=False)

    @classmethod
    def make(cls, layout: Layout) -> Placement:
        """A new one on this node, also within a replica.

        Raises:
            PlacementError: this node could never hold the group.
        """
        node = ray.get_runtime_context().get_node_id()
        record = next(n for n in ray.nodes() if n["NodeID"] == node)
        reason = shortfall(layout, [record])
        if reason is not None:
            raise PlacementError(reason)
        here = {f"node:{record['NodeManagerAddress']}": 0.001}
        return cls(placement_group([layout.bundle() | here], strategy=STRATEGY), own=True)

    async def ready(self) -> None:
        """Wait until the node's resources are ours; the caller bounds the wait."""
        if self.own:
            await asyncio.wrap_future(self._group.ready().future())

    def strategy(self) -> PlacementGroupSchedulingStrategy:
        """The scheduling strategy of the group's actors."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)

    def release(self) -> None:
        """Give the resources back, if they were taken here; the actors in it die with it."""
        if self.own:
            remove_placement_group(self._group)
