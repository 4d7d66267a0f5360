"""Processes for ranks, started before anybody needs them: they import torch while Ray Serve starts.

`Spares` is the command's end, `claim` the replica's. A spare lies in no placement group, and takes no CPUs of Ray's:
those of a group are reserved by its replica. It belongs to whoever claims it first, and ends with that process. A group
that finds none starts its ranks itself, as it does whenever it restarts.

Whose a spare is it says at once, whatever it does: those questions have a thread of their own.
Source: Ray's documentation, "Limiting Concurrency Per-Method with Concurrency Groups".
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import ray

from tpray.errors import GroupError, TprayError
from tpray.group.worker_host import WorkerHost
from tpray.platforms.topology import Topology

log = logging.getLogger(__name__)

NAMESPACE = "tpray-spares"
OWNER = "owner"
"""The concurrency group of the questions of whose a spare is."""

P = ParamSpec("P")
T = TypeVar("T")


class Spares:
    """The spares of a server's first start.

    Args:
        topology: of each of its groups.
        groups: how many there are.
    """

    def __init__(self, topology: Topology, groups: int) -> None:
        remote: Any = ray.remote  # whose types know no concurrency groups
        mark, host = secrets.token_hex(8), remote(concurrency_groups={OWNER: 1})(WorkerHost)
        # Where Ray gives out the cores, a process gets them when it starts.
        count = 0 if topology.on_assigned_cores else groups * len(topology.processes)
        self.names = tuple(f"{mark}-{number}" for number in range(count))
        """By these `claim` knows them."""
        self._actors: list[Any] = [
            host.options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=0).remote() for name in self.names
        ]
        for actor in self._actors:
            actor.preload.remote(topology.threads)

    def prepare_to_trace(self) -> None:
        """Have them import what a trace needs, after what they have been asked already."""
        for actor in self._actors:
            actor.prepare_to_trace.remote()

    def ask(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Any:
        """Have one of them call a function, once it has done what it was asked before; for `answer`."""
        assert not named, "arguments go by their places"
        return self._actors[0].do.remote(work, *arguments)

    def end(self) -> None:
        """End those that nobody has claimed."""
        for actor in self._actors:
            _owner(actor.leave)


def answer(asked: Any) -> Any:
    """What a spare says to what it was `Spares.ask`ed.

    Raises:
        TprayError: what it raised.
        GroupError: it has died.
    """
    try:
        return ray.get(asked)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, TprayError):
            raise e.cause from None
        raise
    except ray.exceptions.RayActorError as e:
        raise GroupError("the process that looked at the model has died: is there enough memory?") from e


async def claim(names: Sequence[str], count: int) -> list[Any]:
    """Up to ``count`` of these spares, for this process and for as long as it lives; none, if this is cancelled."""
    own: list[Any] = []
    left = list(names)
    try:
        while left and len(own) < count:
            wave, left = left[: count - len(own)], left[count - len(own) :]
            await asyncio.gather(*(_claim(name, own) for name in wave))
    except BaseException:
        for actor in own:
            _owner(actor.leave, os.getpid())
        raise
    return own


async def _claim(name: str, own: list[Any]) -> None:
    """Claim a spare; it is in ``own`` from when it is asked until it says no."""
    with suppress(ValueError, ray.exceptions.RayError):  # it has ended
        actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        own.append(actor)
        try:
            claimed = await _owner(actor.claim, os.getpid())
        except ray.exceptions.RayError:
            claimed = False
        if not claimed:
            own.remove(actor)


def _owner(method: Any, *arguments: object) -> Any:
    return method.options(concurrency_group=OWNER).remote(*arguments)
