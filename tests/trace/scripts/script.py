"""The common form of the scripts, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Script:
    """A model as people write it for neuronx-distributed, with what it must equal.

    make: runs on every rank; returns the model, or the model and its io_aliases.
    calls: the inputs of calls one after another, all of the shapes of the first, which is what is traced.
    reference: returns the unsharded model, as a function of such inputs.
    degrees: how many ranks may share it.
    """

    name: str
    make: Callable[[], Any]
    calls: Sequence[tuple[Any, ...]]
    reference: Callable[[], Callable[..., Any]]
    degrees: tuple[int, ...] = (2,)


def settled(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights and biases from one seed, none of them zero or one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.5))
    return model.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 of a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_ids(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """int64 from 0 to count - 1."""
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))
