"""Which nodes of this Ray could hold a group, and the wait for one that can.

Sources: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html and labels.html
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from tpray.config import SPARE_CPUS_LABEL
from tpray.errors import ConfigError, PlacementError
from tpray.platforms.topology import Topology
from tpray.ray_private import available, label_mistake, nodes_are_coming

log = logging.getLogger(__name__)

STRATEGY = "STRICT_PACK"
"""All ranks of a group on one node, or none: the wire does not cross nodes."""


def shortfall(
    topology: Topology, nodes: list[dict[str, Any]] | None = None, labels: Mapping[str, str] | None = None
) -> str | None:
    """Why no node could ever hold the group, in a sentence; None if one could.

    Args:
        nodes: default, all that are alive.
        labels: that the node must have; see `matches`.
    """
    alive = [node for node in (ray.nodes() if nodes is None else nodes) if node["Alive"]]
    found = [_for_groups(node, node["Resources"]) for node in alive if not labels or matches(node["Labels"], labels)]
    needs = topology.resources()
    if any(_holds(has, needs) for has in found):
        return None
    names = {"CPU": "CPUs", topology.platform.resource: topology.platform.resource_label}
    amounts = " and ".join(f"{amount:g} {names[name]}" for name, amount in needs.items())
    wanted = f"a group of {topology.tp} ranks with {topology.cores_per_rank} cores each needs {amounts} on one node"
    if labels:
        shown = ", ".join(f"{key}={value}" for key, value in labels.items())
        if not found:
            return f"{wanted} with the labels {shown}, and no node of this Ray has these: start one, or ask for others"
        wanted += f" with the labels {shown}"
    each = {" and ".join(f"{has.get(name, 0.0):g} {names[name]}" for name in needs) for has in found}
    largest = " or ".join(sorted(each)) or "nothing"
    which = "such node" if labels else "node"
    return f"{wanted}, and no {which} of this Ray has more than {largest}: ask for fewer, or start Ray with more"


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what a selector wants: of each key ``a``, ``!a``, ``in(a,b)`` or ``!in(a,b)``."""
    for key, wanted in selector.items():
        values = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True


def has_room(topology: Topology, labels: Mapping[str, str] | None = None) -> bool:
    """Whether a node of this Ray, with ``labels``, could take the group now, beside what runs on it."""
    suiting = {node["NodeID"] for node in ray.nodes() if not labels or matches(node["Labels"], labels)}
    return any(_holds(free, topology.resources()) for node, free in _available().items() if node in suiting)


def has_room_here(topology: Topology) -> bool:
    """Whether this node could take the group now, beside what runs on it."""
    return _holds(_available().get(ray.get_runtime_context().get_node_id(), {}), topology.resources())


def _available() -> dict[str, dict[str, float]]:
    """What is free for groups on each node, by its id."""
    found = available()
    return {node["NodeID"]: _for_groups(node, found.get(node["NodeID"], {})) for node in ray.nodes()}


def _for_groups(node: dict[str, Any], resources: dict[str, float]) -> dict[str, float]:
    """Without the CPUs that are for other tasks than groups'; see `tpray.config.SPARE_CPUS`."""
    spare = float(node.get("Labels", {}).get(SPARE_CPUS_LABEL, 0))
    return resources | {"CPU": resources.get("CPU", 0.0) - spare} if spare else resources


def _holds(resources: dict[str, float], needs: dict[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in needs.items())


NODE_PATIENCE_S = 120.0
NODE_LIMIT_S = 900.0
"""How long to wait for a node that can hold a group: while no autoscaler starts one, and at the longest."""


def wait_for_node(topology: Topology, labels: Mapping[str, str] | None = None, patience_s: float | None = None) -> None:
    """Return when a node of this Ray could hold the group, were it idle; ask the autoscaler for one meanwhile.

    Without this a deployment whose group is too large for every node would wait for ever, and say so nowhere.

    Args:
        labels: that the node must have; see `matches`.
        patience_s: how long to wait while no autoscaler starts one; the default is `NODE_PATIENCE_S`.

    Raises:
        ConfigError: ``labels`` are no label selector.
        PlacementError: no node has come, and the message says what is wanted and what there is.
    """
    mistake = label_mistake(labels or {})
    if mistake is not None:
        raise ConfigError(f"node_labels: {mistake}")
    reason = shortfall(topology, labels=labels)
    if reason is None:
        return
    log.warning("%s; waiting for such a node", reason)
    selector = [dict(labels)] if labels else None
    # What an autoscaler goes by.
    demand = placement_group([topology.resources()], strategy=STRATEGY, bundle_label_selector=selector)
    started, patience_s = time.monotonic(), NODE_PATIENCE_S if patience_s is None else patience_s
    try:
        while reason is not None:
            waited = time.monotonic() - started
            if is_too_long(waited, patience_s):
                raise PlacementError(f"{reason}; none has come in {waited:.0f} s")
            time.sleep(1)
            reason = shortfall(topology, labels=labels)
    finally:
        remove_placement_group(demand)


def is_too_long(waited_s: float, patience_s: float) -> bool:
    """Whether room has been waited for in vain. patience_s: how long to wait while no autoscaler starts nodes."""
    return waited_s > NODE_LIMIT_S or (waited_s > patience_s and not nodes_are_coming())
