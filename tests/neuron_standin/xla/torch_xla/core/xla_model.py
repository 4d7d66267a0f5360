"""xm: the device and the collectives. Source: torch_xla.core.xla_model's documentation."""

from __future__ import annotations

import torch

REDUCE_SUM = "sum"


def xla_device() -> torch.device:
    """The CPU here, so that programs are traced where they are."""
    return torch.device("cpu")


def all_reduce(
    reduce_type: str, inputs: torch.Tensor, scale: float = 1.0, groups: list[list[int]] | None = None
) -> torch.Tensor:
    """The sum over the ranks of the group."""
    assert reduce_type == REDUCE_SUM
    assert scale == 1.0
    result: torch.Tensor = torch.ops.neuron_standin.all_reduce(inputs, _checked(groups))
    return result


def all_gather(value: torch.Tensor, dim: int = 0, groups: list[list[int]] | None = None) -> torch.Tensor:
    """Every rank's value along dim."""
    result: torch.Tensor = torch.ops.neuron_standin.all_gather(value, dim, _checked(groups))
    return result


def _checked(groups: list[list[int]] | None) -> int:
    # Rule: replica groups partition the ranks; ours is one group of all (XLA's AllReduce, replica_groups).
    if groups is None or len(groups) != 1 or groups[0] != list(range(len(groups[0]))):
        raise ValueError(f"replica groups {groups}")
    return len(groups[0])
