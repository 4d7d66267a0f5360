"""The room that a group of Ray Data's takes: a placement group, which goes when the group's actor does.

Ray removes a placement group only with the whole job (Ray 2.60), and an actor that is killed removes nothing: Ray Data
kills those that are still starting when a dataset has what it wants. So a process of its own looks at who is left.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from tpray.errors import PlacementError
from tpray.group.nodes import STRATEGY, is_too_long, wait_for_node
from tpray.platforms.topology import Topology
from tpray.ray_private import has_ended

PREFIX = "tpray-data-"
"""With what the name of a placement group begins, and then comes the id of its actor."""
SWEEPER = "tpray-data-sweeper"
EVERY_S = 1.0
LINGER_S = 10.0
"""How long the sweeper stays when there is nothing to look at."""


def place(topology: Topology, patience_s: float) -> PlacementGroup:
    """A placement group for a group, once there is room.

    Raises:
        PlacementError: there is none, and none is coming.
    """
    wait_for_node(topology, patience_s=patience_s)
    actor = ray.get_runtime_context().get_actor_id()
    if actor is not None:
        _remove(f"{PREFIX}{actor}")  # what it had before it was started again
        _have_it_swept()
    name = "" if actor is None else f"{PREFIX}{actor}"
    placement: PlacementGroup = placement_group([topology.resources()], strategy=STRATEGY, name=name)
    started = time.monotonic()
    while not placement.wait(1):
        waited = time.monotonic() - started
        if is_too_long(waited, patience_s):
            remove_placement_group(placement)
            needs = " and ".join(f"{amount:g} {name}" for name, amount in topology.resources().items())
            raise PlacementError(
                f"a group needs {needs} of one node, and for {waited:.0f} s no node had so much free: ask for fewer "
                "groups or ranks, or end what holds it"
            )
    return placement


def _have_it_swept() -> None:
    """Have a `Sweeper` of this job, which is started where there is none, and outlives whoever has started it."""
    sweeper: Any = ray.remote(Sweeper)
    sweeper.options(name=SWEEPER, get_if_exists=True, lifetime="detached", num_cpus=0).remote().watch.remote()


class Sweeper:
    """An actor that removes the placement groups of a job whose actors have ended; it ends when there are none."""

    def __init__(self) -> None:
        self._stays_until = 0.0
        self._sweeping: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        """There is going to be one."""
        self._stays_until = time.monotonic() + LINGER_S
        self._sweeping = self._sweeping or asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while await asyncio.to_thread(sweep) or time.monotonic() < self._stays_until:
            await asyncio.sleep(EVERY_S)
        ray.kill(ray.get_runtime_context().current_actor)


def sweep() -> int:
    """Remove the placement groups of this job whose actors have ended; how many others there are."""
    job, left = ray.get_runtime_context().get_job_id(), 0
    for row in placement_group_table().values():
        actor = row["name"].removeprefix(PREFIX)
        if row["state"] == "REMOVED" or actor == row["name"] or not actor.endswith(job):
            continue  # the id of an actor ends with that of its job
        if has_ended(actor):
            _remove(row["name"])
        else:
            left += 1
    return left


def _remove(name: str) -> None:
    """Remove a placement group by its name, if there is one."""
    with suppress(ValueError):
        remove_placement_group(get_placement_group(name))
