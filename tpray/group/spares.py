"""Processes for ranks, started before anybody needs them: they import torch while Ray Serve starts.

`Spares` is the command's end, `claim` the replica's. A spare lies in no placement group, and takes no CPUs of Ray's:
those of a group are reserved by its replica. It belongs to whoever claims it first, and ends with that process. A group
that finds none starts its ranks itself, as it does whenever it restarts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray

from tpray.group.worker_host import WorkerHost
from tpray.platforms.topology import Topology

log = logging.getLogger(__name__)

NAMESPACE = "tpray-spares"


class Spares:
    """The spares of a server's first start.

    Args:
        topology: of each of its groups.
        groups: how many there are.
        traces: whether their ranks will trace.
    """

    def __init__(self, topology: Topology, groups: int, traces: bool = False) -> None:
        mark, host = secrets.token_hex(8), ray.remote(WorkerHost)
        # Where Ray gives out the cores, a process gets them when it starts.
        count = 0 if topology.on_assigned_cores else groups * len(topology.processes)
        self.names = tuple(f"{mark}-{number}" for number in range(count))
        """By these `claim` knows them."""
        self._actors: list[Any] = [
            host.options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=0).remote() for name in self.names
        ]
        for actor in self._actors:
            actor.preload.remote(topology.threads, traces)

    def end(self) -> None:
        """End those that nobody has claimed."""
        for actor in self._actors:
            actor.leave_unless_claimed.remote()


async def claim(names: Sequence[str], count: int) -> list[Any]:
    """Up to ``count`` of these spares, for this process and for as long as it lives."""
    claimed: list[Any] = []
    left = list(names)
    while left and len(claimed) < count:
        wave, left = left[: count - len(claimed)], left[count - len(claimed) :]
        claimed += [actor for actor in await asyncio.gather(*map(_claim, wave)) if actor is not None]
    return claimed


async def _claim(name: str) -> Any:
    with suppress(ValueError, ray.exceptions.RayError):  # it has ended
        actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        if await actor.claim.remote(os.getpid()):
            return actor
    return None
