"""The fastest collective on CPU cores: memory that all ranks of a group have mapped."""

from __future__ import annotations

import mmap
import os
import time

import torch
from torch import Tensor

from tpray.errors import CollectiveError
from tpray.parallel_layers.collective import sum_in_rank_order
from tpray.parallel_layers.counters import LINE


class SharedMemoryCollective:
    """Processes of one machine over memory that they all have mapped; the fastest there is on CPU cores.

    The memory is a memfd that every rank was handed: it has no name, and goes with the last rank.
    Its descriptor becomes the collective's own. Every rank has two slots there, used in turn, a counter of what it has
    written, and the time that it has waited, which the group's owner can read too (`counters`). A collective is: copy
    into the own slot, count up, wait until every rank has counted up, read. Two slots suffice: who writes its next but
    one has seen all others count the next, which they do after reading this one. A step that raises at one point on all
    ranks leaves them at one count, so that the next step goes on from there.

    With more than two ranks an all-reduce is a reduce-scatter and an all-gather: each rank sums its own part of the
    tensor, so that the total of the additions does not grow with N (Thakur et al. 2005, doi:10.1177/1094342005051521).

    That a reader who sees the counter also sees the slot holds on x86-64, where stores become visible in their order
    (Intel SDM vol. 3, 8.2.2); elsewhere `join` takes gloo.

    Args:
        timeout_s: a rank that others wait for longer fails the collective.
        slot_bytes: larger tensors go in pieces. Pages that no tensor has reached take no memory.
    """

    SLOT_BYTES = 32 << 20
    _SPINS = 4_000  # some 200 us: as long as a rank is usually behind
    _YIELDS = 20_000
    _SHAPES = 256  # of tensors, whose views of the slots are kept

    def __init__(self, rank: int, size: int, fd: int, timeout_s: float, slot_bytes: int = SLOT_BYTES) -> None:
        self.rank, self.size = rank, size
        self._timeout_s, self._slot_bytes = timeout_s, slot_bytes
        try:
            os.ftruncate(fd, self.shared_bytes(size, slot_bytes))  # every rank says the same
            self._map = mmap.mmap(fd, self.shared_bytes(size, slot_bytes))
        finally:
            os.close(fd)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._slots = memory[size * LINE :].view(2, size, slot_bytes)
        words, line = memoryview(self._map).cast("q"), LINE // 8
        self._counters, self._waits_ns = words[::line][:size], words[1::line][:size]
        self._others = [other for other in range(size) if other != rank]
        self._views: dict[tuple[torch.Size, torch.dtype], list[list[Tensor]]] = {}  # of the even slots, of the odd ones
        self.begun = 0

    @property
    def waited_ns(self) -> int | None:
        """How long this rank has waited for the others, nanoseconds."""
        return self._waits_ns[self.rank]

    @classmethod
    def shared_bytes(cls, size: int, slot_bytes: int = SLOT_BYTES) -> int:
        """How large the memfd for ``size`` ranks is."""
        return size * LINE + 2 * size * slot_bytes

    def _write(self, part: Tensor) -> list[Tensor]:
        """Put ``part``, which fits, in this rank's slot; every rank's slot, as it will be once they have `_meet`."""
        key = part.shape, part.dtype
        if key not in self._views:
            if len(self._views) >= self._SHAPES:
                self._views.clear()
            with torch.inference_mode(False):  # tensors of that mode could not be written to outside it
                self._views[key] = [
                    [slot[: part.nbytes].view(part.dtype).view(part.shape) for slot in slots] for slots in self._slots
                ]
        self.begun += 1
        slots = self._views[key][self.begun % 2]
        slots[self.rank].copy_(part)
        return slots

    def _meet(self) -> None:
        """Say that this rank has written, and wait until the others have."""
        self._counters[self.rank] = self.begun
        came_ns = time.perf_counter_ns()
        self._wait()
        self._waits_ns[self.rank] += time.perf_counter_ns() - came_ns

    def _wait(self) -> None:
        counters, target = self._counters, self.begun
        spins = 0
        for other in self._others:
            while counters[other] < target and spins < self._SPINS:
                spins += 1
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
        counters, target = self._counters, self.begun
        return [other for other in self._others if counters[other] < target]

    def _pieces(self, x: Tensor) -> list[Tensor]:
        """x, flat, cut into what fits a slot."""
        return list(x.contiguous().view(-1).split(self._slot_bytes // x.element_size()))

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size > 2:
            sums = [self._reduce_in_parts(piece) for piece in self._pieces(x)]
        elif x.nbytes <= self._slot_bytes:
            # One pass, rounded once: torch adds bfloat16 in float32.
            return torch.add(*self._exchange(x))
        else:
            sums = [torch.add(*self._exchange(piece)) for piece in self._pieces(x)]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(x.shape)

    def _reduce_in_parts(self, x: Tensor) -> Tensor:
        part = -(-x.numel() // self.size)  # the last one may be shorter
        own = slice(self.rank * part, (self.rank + 1) * part)
        total = torch.zeros(part, dtype=x.dtype)
        mine = sum_in_rank_order([slot[own] for slot in self._exchange(x)])
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
        self._waits_ns.release()
        self._views.clear()
        del self._slots, self._map  # the last of them unmaps the memory
