"""A process of a group, as the Ray actor that it is: it holds one rank, or all of them as threads.

Nothing here imports torch: importing it may load an accelerator's backend, which reads the environment once, and the
environment is known only when Ray has said which cores the process was given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from tpray.config import RuntimeName
from tpray.errors import GroupError
from tpray.runtime.neuron_env import NeuronPlace

if TYPE_CHECKING:
    from tpray.group.worker import RankInfo, ShardWorker

_ONE_AT_A_TIME = ("trace", "try_trace_function")
_LOADS = ("load", "load_function")
"""torch.export is not safe in two threads at once, and loading a CPU program uses it too. NeuronCores load together."""


class RankHost:
    """A process for some of a group's ranks; `begin` makes them."""

    def __init__(self) -> None:
        self.workers: list[ShardWorker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._in_turn: tuple[str, ...] = ()

    def cores(self) -> tuple[int, ...]:
        """The NeuronCores that Ray gave this process, ascending; () on CPUs."""
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids().get("neuron_cores", [])
        return tuple(sorted(map(int, ids)))

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def begin(
        self,
        ranks: Sequence[int],
        tp: int,
        runtime: RuntimeName,
        threads: int,
        environment: dict[str, str | None] | None = None,
        places: Sequence[NeuronPlace] | None = None,
        cores: Sequence[tuple[int, ...]] | None = None,
        exit_process: Callable[[int], object] = os._exit,
    ) -> list[RankInfo]:
        """Set the environment, and be ``ranks`` of ``tp``. places, cores: of each, on NeuronCores.

        Raises:
            GroupError: something of Neuron was imported already, and has read the environment as it was.
        """
        early = [name for name in ("torch_neuronx", "torch_xla", "libneuronxla") if name in sys.modules]
        if environment and early:
            raise GroupError(f"{early[0]} was imported before this process knew its cores: do not import it for Ray")
        for name, value in (environment or {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        from tpray.group.worker import ShardWorker

        places = places or [NeuronPlace()] * len(ranks)
        self.workers = [
            ShardWorker(rank, tp, runtime, threads, exit_process, place, own)
            for rank, place, own in zip(ranks, places, cores or [()] * len(ranks), strict=True)
        ]
        self._in_turn = (*_ONE_AT_A_TIME, *_LOADS) if runtime in ("auto", "cpu") else _ONE_AT_A_TIME
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
