"""Ranks that are threads, for tests of layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.collective import ThreadCollective
from tpray.parallel_layers.layers import partition_of

T = TypeVar("T")


def on_ranks(tp: int, work: Callable[[int], T]) -> list[T]:
    """What ``work(rank)`` returns on each of tp threads that share a collective."""
    members, errors = ThreadCollective.create(tp, 20), []
    results: list[Any] = [None] * tp

    def run(rank: int) -> None:
        try:
            with parallel_state.use(rank, tp, members[rank]), torch.no_grad():
                results[rank] = work(rank)
        except Exception as e:  # noqa: BLE001  # raised again below, in the test's own thread
            members[rank].close()
            errors.append(e)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def fill(layer: nn.Module, full: dict[str, Tensor]) -> None:
    """Give a layer its parts of whole tensors."""
    for name, parameter in layer.named_parameters():
        value = full[name]
        part = partition_of(parameter)
        parameter.copy_(value if part is None else part.cut(value))


def filled(layer: nn.Module, whole: nn.Module) -> nn.Module:
    """``layer`` with its parts of the parameters of ``whole``, and of its buffers."""
    fill(layer, dict(whole.named_parameters()))
    return layer
