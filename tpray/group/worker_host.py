"""A process of a group, as the Ray actor that it is: it holds one rank, or all of them as threads.

Nothing here imports torch: importing it may load an accelerator's backend, which reads the environment once, and the
environment is known only when Ray has said which cores the process was given.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from tpray import logs
from tpray.config import set_variables
from tpray.errors import GroupError
from tpray.platforms.memory import keep_imports
from tpray.platforms.topology import Topology

if TYPE_CHECKING:
    from tpray.group.jobs import WorkerInfo
    from tpray.group.worker import ShardWorker

T = TypeVar("T")

_TRACES = ("trace", "try_trace_user_model")
_LOADS = ("load", "load_user_model")
"""torch.export is not safe in two threads at once; see also `Platform.loads_in_threads`."""


class WorkerHost:
    """A process for some of a group's ranks; `begin` makes them."""

    def __init__(self) -> None:
        self.workers: list[ShardWorker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._in_turn: tuple[str, ...] = ()
        self._owner: int | None = None  # who has claimed this process; see `tpray.group.spares`

    def preload(self, threads: int) -> None:
        """Import what a rank needs, before there is one. threads: of a rank."""
        set_variables({"OMP_NUM_THREADS": str(threads)})  # read when torch is imported
        from tpray.group import worker

        worker.compute_alone()
        keep_imports()

    def prepare_to_trace(self) -> None:
        """Import what a rank needs to trace besides, which takes seconds."""
        from tpray.group import worker

        worker.import_for_tracing()
        keep_imports()

    def claim(self, owner: int) -> bool:
        """Be the process ``owner``'s from now on, and end with it; False if another one has come first."""
        if self._owner is not None:
            return False
        self._owner = owner
        try:
            fd = os.pidfd_open(owner)
        except ProcessLookupError:
            os._exit(0)
        threading.Thread(target=_end_with, args=(fd,), name="tpray-owner", daemon=True).start()
        return True

    def leave(self, owner: int | None = None) -> None:
        """End this process, unless another one than ``owner`` has claimed it."""
        if self._owner in (None, owner):
            os._exit(0)

    def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """What ``work`` returns here: a function of another layer, for which a rank's process has the imports."""
        return work(*arguments)

    def cores(self, resource: str) -> tuple[int, ...]:
        """The ids of the cores that Ray gave this process of a resource, ascending."""
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids().get(resource, [])
        return tuple(sorted(map(int, ids)))

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def begin(
        self,
        ranks: Sequence[int],
        topology: Topology,
        variables: Mapping[str, str | None] | None = None,
        cores: Sequence[tuple[int, ...]] | None = None,
        log_settings: logs.LogSettings | None = None,
        exit_process: Callable[[int], object] = os._exit,
    ) -> list[WorkerInfo]:
        """Set the environment, and be ``ranks`` of a group.

        Args:
            variables: of the environment; None: must not be set.
            cores: of each of the ranks, where Ray gave them out.
            log_settings: how this process logs; None: it has seen to that itself.

        Raises:
            GroupError: an accelerator's backend was imported already, and has read the environment as it was.
        """
        early = [name for name in topology.platform.backends if name in sys.modules]
        if variables and early:
            raise GroupError(f"{early[0]} was imported before this process knew its cores: do not import it for Ray")
        set_variables(variables or {})
        if log_settings is not None:
            logs.set_up(log_settings, lambda: {"rank": ranks[0]} if len(ranks) == 1 else {})
        from tpray.group.worker import ShardWorker

        together = topology.on_assigned_cores and topology.layout == "single-process"
        for place, rank in enumerate(ranks):
            first_core = place * topology.cores_per_rank if together else None
            assigned = cores[place] if cores is not None else ()
            self.workers.append(ShardWorker(rank, topology, exit_process, first_core, assigned))
        self._in_turn = _TRACES if topology.platform.loads_in_threads else (*_TRACES, *_LOADS)
        if len(ranks) > 1:
            self._threads = ThreadPoolExecutor(len(ranks), thread_name_prefix="tpray-host")
        return [worker.info() for worker in self.workers]

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a `ShardWorker` method on every rank here, each with its own arguments; all at once where that is safe.

        Raises:
            TprayError: what the first rank to fail raised.
        """
        bound = [getattr(worker, method) for worker in self.workers]
        if self._threads is None or method in self._in_turn:
            return [f(*own) for f, own in zip(bound, arguments, strict=False)]
        futures = [self._threads.submit(f, *own) for f, own in zip(bound, arguments, strict=False)]
        for done in wait(futures, return_when=FIRST_EXCEPTION).done:
            done.result()
        return [future.result() for future in futures]


def _end_with(fd: int) -> None:
    """End this process when another one has ended. fd: that one's pidfd, which can be read then."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()
    os._exit(0)
