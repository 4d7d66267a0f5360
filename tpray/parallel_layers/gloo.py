"""The collective that works wherever torch does: torch.distributed's gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpray.errors import CollectiveError
from tpray.parallel_layers.collective import accumulate_dtype


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
        self.begun = 0
        self.waited_ns: int | None = None
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
        total = x.to(accumulate_dtype(x.dtype), copy=True).contiguous()
        self._run("all-reduce", lambda: self._group.allreduce([total]))
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run("all-gather", lambda: self._group.allgather([parts], [x]))
        return torch.cat(parts, dim=dim)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        self._run("broadcast", lambda: self._group.broadcast(result, source))
        return result

    def close(self) -> None:
        del self._group
        del self._store  # it opens its file once more when it goes
        os.close(self._store_fd)

    def _run(self, name: str, begin: Callable[[], dist.Work]) -> None:
        self.begun += 1
        try:
            begin().wait()
        except RuntimeError as e:
            raise CollectiveError(f"rank {self.rank}: {name} failed, a peer is gone or late: {e}") from e
