"""Which rank am I, of how many, and through what do we talk?

The state belongs to a context (`contextvars`), not to the process: in the usual layout a process is one
rank, but ranks may also be threads, and each must see its own. Layers ask here when they are built;
collective operators ask here when they run.

The ``get_tensor_model_parallel_*`` names are those of neuronx-distributed and Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tpray.errors import CollectiveError, ConfigError

if TYPE_CHECKING:
    from tpray.parallel_layers.collective import Collective


@dataclass(frozen=True)
class ParallelState:
    """One rank's view of its group."""

    rank: int
    size: int
    collective: Collective


_state: ContextVar[ParallelState] = ContextVar("tpray_parallel_state")


def current() -> ParallelState:
    """The state of this context.

    Raises:
        ConfigError: nothing was initialised here.
    """
    try:
        return _state.get()
    except LookupError:
        raise ConfigError(
            "tensor parallelism is not initialised in this thread: build and run parallel layers inside "
            "`with parallel_state.use(rank, size, collective)`, or inside the function that you hand to "
            "tpray, which does it for you"
        ) from None


@contextmanager
def use(rank: int, size: int, collective: Collective | None = None) -> Iterator[ParallelState]:
    """Be rank ``rank`` of ``size`` within the block.

    Without a collective the block can build, slice and trace a shard, which needs no peers, but a
    collective that is really executed in it raises `CollectiveError`.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not in a group of {size}")
    token = _state.set(ParallelState(rank, size, collective or cast("Collective", _Absent(rank, size))))
    try:
        yield _state.get()
    finally:
        _state.reset(token)


@dataclass(frozen=True)
class _Absent:
    """Stands where a shard is built or traced and no collective may run."""

    rank: int
    size: int

    def __getattr__(self, name: str) -> Any:
        raise CollectiveError(f"rank {self.rank} of {self.size} has no collective: {name} cannot run here")


def model_parallel_is_initialized() -> bool:
    """Whether this context belongs to a group."""
    return _state.get(None) is not None


def get_tensor_model_parallel_size() -> int:
    """The tensor-parallel degree: how many ranks share one model."""
    return current().size


def get_tensor_model_parallel_rank() -> int:
    """This rank's number, 0 to size - 1."""
    return current().rank
