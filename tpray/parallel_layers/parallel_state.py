"""Which rank am I, of how many, and through what do we talk?

The state belongs to a context (`contextvars`), not to the process: in the usual layout a process is one
rank, but ranks may also be threads, and each must see its own. Layers ask here when they are built;
collective operators ask here when they run.

The names are those of neuronx-distributed's ``parallel_layers.parallel_state`` and of Megatron-LM. There is one kind of
parallelism here: of all others each rank is a group of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


_state: ContextVar[ParallelState | None] = ContextVar("tpray_parallel_state", default=None)
_own: ContextVar[bool] = ContextVar("tpray_own_parallel_state", default=False)
"""Whether the state is one that `initialize_model_parallel` made."""


def current() -> ParallelState:
    """The state of this context.

    Raises:
        ConfigError: nothing was initialised here.
    """
    state = _state.get()
    if state is None:
        raise ConfigError(
            "tensor parallelism is not initialised in this thread: build and run parallel layers inside "
            "`with parallel_state.use(rank, size, collective)`, or inside the function that you hand to "
            "tpray, which does it for you"
        )
    return state


@contextmanager
def use(rank: int, size: int, collective: Collective | None = None) -> Iterator[ParallelState]:
    """Be rank ``rank`` of ``size`` within the block.

    Without a collective the block can build, slice and trace a shard, which needs no peers, but a
    collective that is really executed in it raises `CollectiveError`.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not in a group of {size}")
    state = ParallelState(rank, size, collective or cast("Collective", _Absent(rank, size)))
    tokens = _state.set(state), _own.set(False)
    try:
        yield state
    finally:
        _state.reset(tokens[0])
        _own.reset(tokens[1])


@dataclass(frozen=True)
class _Absent:
    """Stands where a shard is built or traced and no collective may run."""

    rank: int
    size: int

    def __getattr__(self, name: str) -> Any:
        raise CollectiveError(f"rank {self.rank} of {self.size} has no collective: {name} cannot run here")


def model_parallel_is_initialized() -> bool:
    """Whether this context belongs to a group."""
    return _state.get() is not None


def get_tensor_model_parallel_size() -> int:
    """The tensor-parallel degree: how many ranks share one model."""
    return current().size


def get_tensor_model_parallel_rank() -> int:
    """This rank's number, 0 to size - 1."""
    return current().rank


_aot_mode: ContextVar[bool] = ContextVar("tpray_aot_mode", default=False)


def set_aot_mode(mode: bool) -> None:
    """True: layers leave their weights as the memory is, for a caller that fills all of them."""
    _aot_mode.set(mode)


def get_aot_mode() -> bool:
    """What `set_aot_mode` said in this context."""
    return _aot_mode.get()


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    skip_collective_init: bool = False,
    lnc_size: int = 1,
    mesh_only: bool = False,
) -> None:
    """Upstream's call. On a rank it only checks the sizes; elsewhere it makes this context a group of one.

    Args:
        skip_collective_init, lnc_size, mesh_only: how upstream makes its process groups, which are none here.

    Raises:
        ConfigError: a size other than the group's, or a kind of parallelism that tpray does not have.
    """
    others = {
        "pipeline": pipeline_model_parallel_size,
        "context": context_parallel_size,
        "expert": expert_model_parallel_size,
    }
    for kind, size in others.items():
        if size != 1:
            raise ConfigError(f"tpray has no {kind} parallelism: leave its size at 1, which was {size}")
    state = _state.get()
    if state is None and tensor_model_parallel_size == 1:
        from tpray.parallel_layers.collective import SingleRank

        _state.set(ParallelState(0, 1, SingleRank()))
        _own.set(True)
    elif state is None:
        raise ConfigError(
            f"tensor_model_parallel_size {tensor_model_parallel_size} wants ranks, and here there are none: they are "
            "started by tpray.trace.parallel_model_trace, which calls your function on each of them"
        )
    elif state.size != tensor_model_parallel_size:
        raise ConfigError(
            f"tensor_model_parallel_size is {tensor_model_parallel_size} and this group has {state.size} ranks: give "
            "parallel_model_trace that tp_degree"
        )


def destroy_model_parallel() -> None:
    """End what `initialize_model_parallel` began; a rank stays the rank that it is."""
    if _own.get():
        _state.set(None)
        _own.set(False)


def set_tensor_model_parallel_size(world_size: int) -> None:
    """Refused unless it changes nothing: the degree is the group's, for which its ranks were started."""
    if world_size != current().size:
        raise ConfigError(f"the degree is {current().size}: give parallel_model_trace tp_degree={world_size} instead")


def set_tensor_model_parallel_rank(rank: int) -> None:
    """Refused unless it changes nothing; to be another rank, use ``with parallel_state.use(rank, size):``."""
    if rank != current().rank:
        raise ConfigError(f"this is rank {current().rank}: use `with parallel_state.use({rank}, size):` to be another")


class ProcessGroup:
    """Ranks that belong together, with the methods of `torch.distributed.ProcessGroup` that layers use."""

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        """ranks: their numbers. rank: this one's."""
        self.ranks, self._place = tuple(ranks), list(ranks).index(rank)

    def size(self) -> int:
        """How many ranks it has."""
        return len(self.ranks)

    def rank(self) -> int:
        """This rank's place in it."""
        return self._place


Groups = list[list[int]]


def check_group(group: object) -> None:
    """Refuse a group over which nothing can be combined: tpray's collectives run over all ranks of a group.

    Raises:
        ConfigError: it is neither None nor all ranks.
    """
    size = current().size
    if group is None or (isinstance(group, ProcessGroup) and group.size() == size):
        return
    given = f"one of {group.size()} ranks" if isinstance(group, ProcessGroup) else f"a {type(group).__name__}"
    raise ConfigError(
        f"a process group must be parallel_state.get_tensor_model_parallel_group(), with all {size} ranks, and this is "
        f"{given}: leave it out"
    )


def get_tensor_model_parallel_replica_groups() -> Groups:
    """The one group of all ranks."""
    return [list(range(current().size))]


def get_tensor_model_parallel_group(as_list: bool = False) -> ProcessGroup | Groups:
    """All ranks; as a list of lists of their numbers if asked for."""
    return (
        get_tensor_model_parallel_replica_groups() if as_list else ProcessGroup(range(current().size), current().rank)
    )


def get_world_group(as_list: bool = False) -> ProcessGroup | Groups:
    """The same as `get_tensor_model_parallel_group`: there are no other ranks."""
    return get_tensor_model_parallel_group(as_list)


def get_tensor_model_parallel_src_rank() -> int:
    """The first rank of the group."""
    current()
    return 0


def _each_alone() -> Groups:
    return [[rank] for rank in range(current().size)]


def _alone(as_list: bool = False) -> ProcessGroup | Groups:
    return _each_alone() if as_list else ProcessGroup([current().rank], current().rank)


def _one() -> int:
    current()
    return 1


def _zero() -> int:
    current()
    return 0


def _own_rank() -> int:
    return current().rank


# Of the kinds of parallelism that tpray does not have, each rank is a group of its own.
get_data_parallel_replica_groups = get_pipeline_model_parallel_replica_groups = _each_alone
get_context_model_parallel_replica_groups = get_expert_model_parallel_replica_groups = _each_alone
get_data_parallel_group = get_pipeline_model_parallel_group = _alone
get_context_model_parallel_group = get_expert_model_parallel_group = _alone
get_data_parallel_size = get_pipeline_model_parallel_size = _one
get_context_model_parallel_size = get_expert_model_parallel_size = _one
get_data_parallel_rank = get_pipeline_model_parallel_rank = _zero
get_context_model_parallel_rank = get_expert_model_parallel_rank = _zero
get_data_parallel_src_rank = _own_rank
get_pipeline_model_parallel_next_rank = get_pipeline_model_parallel_prev_rank = _own_rank


def is_global_rank_zero() -> bool:
    """Whether this is rank 0."""
    return current().rank == 0


def get_rank_info_str() -> str:
    """This rank's place in every kind of parallelism, for a log."""
    return f"DP_0_TP_{current().rank}_PP_0" if model_parallel_is_initialized() else "model_parallel_uninitialized"
