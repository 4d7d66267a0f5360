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
import mmap
import os
import platform
import threading
import time
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from tpray.errors import CollectiveError
from tpray.parallel_layers import parallel_state

log = logging.getLogger("tpray.collective")


@runtime_checkable
class Collective(Protocol):
    """What a group of ranks can do together. Every rank must make the same calls in the same order."""

    rank: int
    size: int

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

    @classmethod
    def create(cls, size: int, timeout_s: float = 60.0) -> list[ThreadCollective]:
        """The ``size`` members of one group; a member that waits longer than timeout_s raises."""
        slots: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size, timeout=timeout_s)
        return [cls(rank, slots, barrier) for rank in range(size)]

    def _exchange(self, x: Tensor) -> list[Tensor]:
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
        return _sum_in_rank_order(self._exchange(x))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchange(x), dim=dim)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._exchange(x)[source].clone()

    def close(self) -> None:
        self._barrier.abort()


class SharedMemoryCollective:
    """Processes of one machine over memory that they all have mapped; the fastest there is on CPU cores.

    The memory is a memfd that every rank was handed, of `shared_bytes`: it has no name, and goes with the last rank.
    Its descriptor becomes the collective's own. Every rank has two slots there, used in turn, and a counter of what it
    has written. A collective is: copy into the own slot, count up, wait until every rank has counted up, read. Two
    slots suffice: who writes its next but one has seen all others count the next, which they do after reading this one.

    With more than two ranks an all-reduce is a reduce-scatter and an all-gather: each rank sums its own part of the
    tensor, so that the total of the additions does not grow with N (Thakur et al. 2005, doi:10.1177/1094342005051521).

    That a reader who sees the counter also sees the slot holds on x86-64, where stores become visible in their order
    (Intel SDM vol. 3, 8.2.2); elsewhere `join` takes gloo.

    Args:
        timeout_s: a rank that others wait for longer fails the collective.
        slot_bytes: larger tensors go in pieces. Pages that no tensor has reached take no memory.
    """

    SLOT_BYTES = 32 << 20
    _LINE = 64  # bytes between counters, so that no two ranks write to one cache line
    _SPINS = 1_000  # some 200 us: as long as a rank is usually behind
    _YIELDS = 20_000

    def __init__(self, rank: int, size: int, fd: int, timeout_s: float, slot_bytes: int = SLOT_BYTES) -> None:
        self.rank, self.size = rank, size
        self._timeout_s, self._slot_bytes = timeout_s, slot_bytes
        try:
            self._map = mmap.mmap(fd, self.shared_bytes(size, slot_bytes))
        finally:
            os.close(fd)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._slots = memory[size * self._LINE :].view(2, size, slot_bytes)
        self._counters = memoryview(self._map).cast("q")[:: self._LINE // 8][:size]
        self._others = [other for other in range(size) if other != rank]
        self._written = 0

    @classmethod
    def shared_bytes(cls, size: int, slot_bytes: int = SLOT_BYTES) -> int:
        """How large the memfd for ``size`` ranks is."""
        return size * cls._LINE + 2 * size * slot_bytes

    def _write(self, part: Tensor) -> list[Tensor]:
        """Put a flat ``part`` in this rank's slot; every rank's slot, as it will be once they have `_meet`."""
        self._written += 1
        own = self._slots[self._written % 2]
        slots = [own[rank, : part.nbytes].view(part.dtype) for rank in range(self.size)]
        slots[self.rank].copy_(part)
        return slots

    def _meet(self) -> None:
        """Say that this rank has written, and wait until the others have."""
        self._counters[self.rank] = self._written
        for _ in range(self._SPINS):
            if not self._late():
                return
        give_up = time.monotonic() + self._timeout_s
        waits = 0
        while late := self._late():
            waits += 1
            # Ranks may outnumber cores, or be threads: let the one run that is behind.
            os.sched_yield()
            time.sleep(0 if waits < self._YIELDS else 1e-4)
            if time.monotonic() > give_up:
                ranks = ", ".join(map(str, late))
                raise CollectiveError(f"rank {self.rank} waited {self._timeout_s:g} s in a collective for rank {ranks}")

    def _late(self) -> list[int]:
        counters, target = self._counters, self._written
        return [other for other in self._others if counters[other] < target]

    def _pieces(self, x: Tensor) -> list[Tensor]:
        """x, flat, cut into what fits a slot."""
        return list(x.contiguous().view(-1).split(self._slot_bytes // x.element_size()))

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 2:
            # One pass, rounded once: torch adds bfloat16 in float32.
            sums = [torch.add(*self._exchange(piece)) for piece in self._pieces(x)]
        else:
            sums = [self._reduce_in_parts(piece) for piece in self._pieces(x)]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(x.shape)

    def _reduce_in_parts(self, x: Tensor) -> Tensor:
        part = -(-x.numel() // self.size)  # the last one may be shorter
        own = slice(self.rank * part, (self.rank + 1) * part)
        total = torch.zeros(part, dtype=x.dtype)
        mine = _sum_in_rank_order([slot[own] for slot in self._exchange(x)])
        total[: mine.numel()] = mine
        return torch.cat(self._exchange(total))[: x.numel()]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        slots = self._write(x)
        self._meet()
        return slots

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        gathered = [[slot.clone() for slot in self._exchange(piece)] for piece in self._pieces(x)]
        parts = [torch.cat([slots[rank] for slots in gathered]).view(x.shape) for rank in range(self.size)]
        return torch.cat(parts, dim=dim)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return torch.cat([self._exchange(piece)[source].clone() for piece in self._pieces(x)]).view(x.shape)

    def close(self) -> None:
        self._counters.release()
        del self._slots, self._map  # the last of them unmaps the memory


class GlooCollective:
    """torch.distributed's gloo between processes of one machine, over loopback.

    The rendezvous is a ``FileStore`` on a memfd that all ranks were handed, so it has no name in any file
    system and no listening port, and nothing is left behind when a rank is killed. The descriptor becomes the
    collective's own, and `close` closes it.

    Source: https://docs.pytorch.org/docs/stable/distributed.html (FileStore, ProcessGroupGloo).
    """

    def __init__(self, rank: int, size: int, store_fd: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._store_fd = store_fd
        try:
            self._store = torch._C._distributed_c10d.FileStore(f"/proc/self/fd/{store_fd}", size)
            gloo: Any = dist.ProcessGroupGloo  # its stub lacks the calls below
            options = gloo._Options()
            # Without a device gloo listens on the address of the host's name, which others can reach.
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            options._timeout = timedelta(seconds=timeout_s)
            self._group = gloo(self._store, rank, size, options)
        except RuntimeError as e:
            raise CollectiveError(f"rank {rank} of {size} could not join the gloo group: {e}") from e

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.to(_accumulate_dtype(x.dtype), copy=True).contiguous()
        self._run("all-reduce", self._group.allreduce([total]))
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run("all-gather", self._group.allgather([parts], [x]))
        return torch.cat(parts, dim=dim)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        self._run("broadcast", self._group.broadcast(result, source))
        return result

    def close(self) -> None:
        del self._group
        del self._store  # it opens its file once more when it goes
        os.close(self._store_fd)

    def _run(self, name: str, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as e:
            raise CollectiveError(f"rank {self.rank}: {name} failed, a peer is gone or late: {e}") from e


def join(rank: int, size: int, memory_fd: int, store_fd: int, timeout_s: float) -> Collective:
    """The fastest collective that is right on this machine; both descriptors become its own.

    Args:
        memory_fd: a memfd of `SharedMemoryCollective.shared_bytes`.
        store_fd: an empty memfd, gloo's meeting place.
    """
    if size == 1:
        chosen: Collective = SingleRank()
        unused = [memory_fd, store_fd]
    elif platform.machine() in ("x86_64", "AMD64"):
        chosen, unused = SharedMemoryCollective(rank, size, memory_fd, timeout_s), [store_fd]
    else:
        log.warning("%s does not order its stores: collectives go over gloo, not shared memory", platform.machine())
        chosen, unused = GlooCollective(rank, size, store_fd, timeout_s), [memory_fd]
    for fd in unused:
        os.close(fd)
    return chosen


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _sum_in_rank_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].to(_accumulate_dtype(parts[0].dtype), copy=True)
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


def all_reduce(x: Tensor) -> Tensor:
    """Sum x over the ranks of the calling thread's group; traces as one operator."""
    result: Tensor = torch.ops.tpray.all_reduce(x)
    return result


def all_gather(x: Tensor, dim: int = -1) -> Tensor:
    """Concatenate every rank's x along dim, in rank order; traces as one operator."""
    size = parallel_state.get_tensor_model_parallel_size()
    result: Tensor = torch.ops.tpray.all_gather(x, dim % x.dim(), size)
    return result


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """The x of rank ``source`` on every rank; traces as one operator."""
    result: Tensor = torch.ops.tpray.broadcast(x, source)
    return result
