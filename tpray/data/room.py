"""The room that a group of Ray Data's takes: a placement group, which goes when the group's actor does.

Ray removes a placement group only with the whole job (Ray 2.60), and an actor that is killed removes nothing: Ray Data
kills those that are still starting when a dataset has what it wants. So a process of its own looks at who is left.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError
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

log = logging.getLogger(__name__)

PREFIX = "tpray-data-"
"""With what the name of a placement group begins, and then comes the id of its actor."""
SWEEPER = "tpray-data-sweeper-"
"""With what the name of a `Sweeper` begins, and then comes the id of its job."""
ASKED = 3
"""How often a sweeper is asked to watch; one that ends just then is followed by another."""
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
    name = "" if actor is None else f"{PREFIX}{actor}"
    if name:
        _remove(name)  # what it had before it was started again
        _have_it_swept()
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
    own = sweeper.options(
        name=sweeper_name(), get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1
    )  # fmt: skip
    for _ in range(ASKED):
        with suppress(RayActorError, ValueError):  # it was about to end
            ray.get(own.remote().watch.remote())  # waited for: whoever asks may be killed before it is sent
            return
    log.warning("nobody removes the placement group of this group if its process is killed")


def sweeper_name() -> str:
    """Of the `Sweeper` of this job."""
    return f"{SWEEPER}{ray.get_runtime_context().get_job_id()}"


class Sweeper:
    """An actor that removes the placement groups of a job whose actors have ended; it ends when there are none."""

    def __init__(self) -> None:
        self._self = ray.get_runtime_context().current_actor
        self.watch()
        threading.Thread(target=self._sweep, name="tpray-sweeper", daemon=True).start()

    def watch(self) -> None:
        """There is going to be one."""
        self._stays_until = time.monotonic() + LINGER_S

    def _sweep(self) -> None:
        left = 0
        while left or time.monotonic() < self._stays_until:
            time.sleep(EVERY_S)
            try:
                left = sweep()
            except Exception as e:  # noqa: BLE001  # Ray's control store may be away for a while
                log.warning("placement groups cannot be looked at: %s", e)
        ray.kill(self._self)


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
