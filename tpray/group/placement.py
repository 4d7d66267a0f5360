"""Where a group runs: one placement group, one bundle, one node.

The bundle carries the cores of the whole group, and the ranks and the group's owner share it: Ray then
either places all of them on one node or none. Inside a Serve replica the placement group is the replica's
own; elsewhere the group makes one, on the node of its owner, since the wire does not cross nodes.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html, accelerators.html
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
from tpray.group.nodes import STRATEGY, shortfall
from tpray.platforms.topology import Topology


class Placement:
    """A placement group that holds, or will hold, one group. ``own``: made here and removed here."""

    def __init__(self, group: PlacementGroup, own: bool) -> None:
        self._group, self.own = group, own

    @classmethod
    async def acquire(cls, topology: Topology) -> Placement:
        """The placement group of the replica that calls, or a new one on this node.

        Raises:
            PlacementError: this node could never hold the group.
        """
        current = get_current_placement_group()
        return cls.make(topology) if current is None else cls(current, own=False)

    @classmethod
    def make(cls, topology: Topology) -> Placement:
        """A new one on this node, also within a replica.

        Raises:
            PlacementError: this node could never hold the group.
        """
        node = ray.get_runtime_context().get_node_id()
        record = next(n for n in ray.nodes() if n["NodeID"] == node)
        reason = shortfall(topology, [record])
        if reason is not None:
            raise PlacementError(reason)
        here = {f"node:{record['NodeManagerAddress']}": 0.001}
        return cls(placement_group([topology.resources() | here], strategy=STRATEGY), own=True)

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
