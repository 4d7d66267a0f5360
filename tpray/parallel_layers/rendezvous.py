"""How the ranks of a group meet, and which collective they take."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tpray.parallel_layers.collective import Collective, SingleRank
from tpray.parallel_layers.gloo import GlooCollective
from tpray.parallel_layers.shared_memory import SharedMemoryCollective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendezvous:
    """What a rank is handed to meet the others: two memfds, the same for all, empty when the first of them comes.

    memory_fd: for memory that they share. store_fd: for torch.distributed's FileStore.
    """

    rank: int
    size: int
    memory_fd: int
    store_fd: int
    timeout_s: float


class CollectiveKind(NamedTuple):
    """A row of `COLLECTIVES`. works: for so many ranks, on this machine. make: keeps descriptors of its own.

    warning: what to say when it has to be taken, with a place for the name of the machine's architecture.
    """

    name: str
    works: Callable[[int], bool]
    make: Callable[[Rendezvous], Collective]
    warning: str = ""


COLLECTIVES = (
    CollectiveKind("none", lambda size: size == 1, lambda _: SingleRank()),
    CollectiveKind(
        "shared memory",
        lambda _: platform.machine() in ("x86_64", "AMD64"),  # elsewhere stores may be seen out of their order
        lambda r: SharedMemoryCollective(r.rank, r.size, os.dup(r.memory_fd), r.timeout_s),
    ),
    CollectiveKind(
        "gloo",
        lambda _: True,
        lambda r: GlooCollective(r.rank, r.size, os.dup(r.store_fd), r.timeout_s),
        "%s does not order its stores: collectives go over gloo, not shared memory",
    ),
)
"""The fastest first."""


def join(meet: Rendezvous) -> Collective:
    """The fastest collective that is right on this machine; the descriptors of ``meet`` are closed."""
    kind = next(kind for kind in COLLECTIVES if kind.works(meet.size))
    if kind.warning:
        log.warning(kind.warning, platform.machine())
    try:
        return kind.make(meet)
    finally:
        os.close(meet.memory_fd)
        os.close(meet.store_fd)
