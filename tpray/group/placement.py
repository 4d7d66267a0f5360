"""Where a group runs: one placement group, one bundle, one node.

The bundle carries the cores of the whole group, and the ranks and the group's owner share it: Ray then
either places all of them on one node or none. Inside a Serve replica the placement group is the replica's
own; elsewhere the group makes one, on the node of its owner, since the wire does not cross nodes.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html
"""

from __future__ import annotations

import asyncio

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpray.errors import PlacementError

STRATEGY = "STRICT_PACK"


def bundle(tp: int, threads: int) -> dict[str, float]:
    """What one group of ``tp`` ranks with ``threads`` cores each takes from its node."""
    return {"CPU": float(tp * threads)}


class Placement:
    """A placement group that holds, or will hold, one group. ``own``: made here and removed here."""

    def __init__(self, group: PlacementGroup, own: bool) -> None:
        self._group, self._own = group, own

    @classmethod
    async def acquire(cls, tp: int, threads: int) -> Placement:
        """The placement group of the replica that calls, or a new one on this node.

        Raises:
            PlacementError: this node could never hold the group.
        """
        current = get_current_placement_group()
        if current is not None:
            return cls(current, own=False)
        node = ray.get_runtime_context().get_node_id()
        record = next(n for n in ray.nodes() if n["NodeID"] == node)
        needs, has = tp * threads, record["Resources"].get("CPU", 0.0)
        if needs > has:
            raise PlacementError(
                f"a group of {tp} ranks with {threads} cores each needs {needs} CPUs on one node, and Ray was "
                f"given {has:g} on this one: ask for fewer, or start Ray with more"
            )
        here = {f"node:{record['NodeManagerAddress']}": 0.001}
        return cls(placement_group([bundle(tp, threads) | here], strategy=STRATEGY), own=True)

    async def ready(self) -> None:
        """Wait until the node's resources are ours; the caller bounds the wait."""
        if self._own:
            await asyncio.wrap_future(self._group.ready().future())

    def strategy(self) -> PlacementGroupSchedulingStrategy:
        """The scheduling strategy of the group's actors."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)

    def release(self) -> None:
        """Give the resources back, if they were taken here; the actors in it die with it."""
        if self._own:
            remove_placement_group(self._group)
