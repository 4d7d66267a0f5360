"""Collectives: how the ranks of one group combine tensors inside a step.

Legend: N ranks; x any contiguous CPU tensor of one shape and dtype on every rank.

A traced program does not hold a collective. It calls the operators ``tpray::all_reduce``,
``tpray::all_gather`` and ``tpray::broadcast`` (defined at the end), and these ask `parallel_state` for the
collective of the calling thread. So one saved program runs over shared memory, over gloo, or alone.

Every collective returns a new tensor, the same bits on every rank, and raises `CollectiveError` when a
peer is gone or late. bfloat16 is summed in float32 (``reduce_dtype`` of neuronx-distributed).
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tpray.errors import CollectiveError, ConfigError
from tpray.parallel_layers import parallel_state

log = logging.getLogger(__name__)


@runtime_checkable
class Collective(Protocol):
    """What a group of ranks can do together. Every rank must make the same calls in the same order."""

    rank: int
    size: int
    begun: int  # exchanges with the other ranks that this one has begun: its place in the order of the calls

    @property
    def waited_ns(self) -> int | None:
        """How long this rank has waited for the others in exchanges, nanoseconds; None: that is not measured."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x, on every rank."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's x in rank order, concatenated along dim."""
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The x of rank ``source``, on every rank."""
        ...

    def close(self) -> None:
        """Free what the collective holds; it cannot be used afterwards."""
        ...


class SingleRank:
    """The collective of a group of one: nothing to combine."""

    rank = 0
    size = 1
    begun = 0
    waited_ns: int | None = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.clone()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x.clone()

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x.clone()

    def close(self) -> None:
        return None


class ThreadCollective:
    """Ranks that are threads of one process: parity checks without any second process.

    Make one set with `create`; each thread uses the member of its rank.
    """

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier
        self.begun = 0
        self.waited_ns: int | None = None

    @classmethod
    def create(cls, size: int, timeout_s: float = 60.0) -> list[ThreadCollective]:
        """The ``size`` members of one group; a member that waits longer than timeout_s raises."""
        slots: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size, timeout=timeout_s)
        return [cls(rank, slots, barrier) for rank in range(size)]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.begun += 1
        self._slots[self.rank] = x
        self._wait()
        parts = [part for part in self._slots if part is not None]
        self._wait()  # nobody overwrites a slot before everybody has read it
        return parts

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError as e:
            raise CollectiveError(f"rank {self.rank}: another rank did not reach the collective") from e

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum_in_rank_order(self._exchange(x))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchange(x), dim=dim)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._exchange(x)[source].clone()

    def close(self) -> None:
        self._barrier.abort()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of ``dtype`` is summed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def sum_in_rank_order(parts: list[Tensor]) -> Tensor:
    """The sum of every rank's part, the same bits on every rank."""
    total = parts[0].to(accumulate_dtype(parts[0].dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)


# The operators that a traced program calls. `Library.define` costs 2.4 us a call where `custom_op` costs 7.3.
_library = torch.library.Library("tpray", "DEF")
_library.define("all_reduce(Tensor x) -> Tensor")
_library.define("all_gather(Tensor x, int dim, int size) -> Tensor")
_library.define("broadcast(Tensor x, int source) -> Tensor")


def _all_reduce(x: Tensor) -> Tensor:
    return parallel_state.current().collective.all_reduce(x)


def _all_gather(x: Tensor, dim: int, size: int) -> Tensor:
    collective = parallel_state.current().collective
    if collective.size != size:
        raise CollectiveError(f"the program was traced for {size} ranks and runs in a group of {collective.size}")
    return collective.all_gather(x, dim)


def _broadcast(x: Tensor, source: int) -> Tensor:
    return parallel_state.current().collective.broadcast(x, source)


def _all_gather_shape(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= size
    return x.new_empty(shape)


_library.impl("all_reduce", _all_reduce, "CPU")
_library.impl("all_gather", _all_gather, "CPU")
_library.impl("broadcast", _broadcast, "CPU")
torch.library.register_fake("tpray::all_reduce", lambda x: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("tpray::all_gather", _all_gather_shape, lib=_library)
torch.library.register_fake("tpray::broadcast", lambda x, source: torch.empty_like(x), lib=_library)


def _no_gradient(context: object, *gradients: object) -> None:
    raise ConfigError("tpray's layers are for inference: no gradient crosses a collective; use torch.no_grad()")


for _name in ("all_reduce", "all_gather", "broadcast"):
    torch.library.register_autograd(f"tpray::{_name}", _no_gradient, lib=_library)


def all_reduce(x: Tensor) -> Tensor:
    """Sum x over the ranks of the calling thread's group; traces as one operator."""
    result: Tensor = torch.ops.tpray.all_reduce(x)
    return result


def all_reduce_in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`all_reduce`, summed in ``dtype`` and then converted back."""
    if dtype in (x.dtype, accumulate_dtype(x.dtype)):
        return all_reduce(x)
    return all_reduce(x.to(dtype)).to(x.dtype)


def all_gather(x: Tensor, dim: int = -1) -> Tensor:
    """Concatenate every rank's x along dim, in rank order; traces as one operator."""
    size = parallel_state.get_tensor_model_parallel_size()
    result: Tensor = torch.ops.tpray.all_gather(x, dim % x.dim(), size)
    return result


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """The x of rank ``source`` on every rank; traces as one operator."""
    result: Tensor = torch.ops.tpray.broadcast(x, source)
    return result
