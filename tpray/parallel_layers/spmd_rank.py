"""The rank as a tensor, for models that compute with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpray.errors import ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.partition import Partition, mark_sharded


class SPMDRank(nn.Module):
    """This rank's number as a parameter, ``rank``, int32 ``[1]``.

    It is right from the start, and stays so when a checkpoint is loaded that has ``torch.arange(world_size)`` for it,
    of which each rank takes its item; upstream's is zero until then.

    Args:
        world_size: how many ranks there are.
        tensor_model_parallel_size: the degree, which is the same here.

    Raises:
        ConfigError: the group has another size.
    """

    def __init__(self, world_size: int, tensor_model_parallel_size: int | None = None) -> None:
        super().__init__()
        state = parallel_state.current()
        for size in (world_size, tensor_model_parallel_size or world_size):
            if size != state.size:
                raise ConfigError(f"an SPMDRank of {size} ranks in a group of {state.size}: they must be the same")
        self.world_size = self.tensor_model_parallel_size = world_size
        self.rank = nn.Parameter(torch.tensor([state.rank], dtype=torch.int32), requires_grad=False)
        mark_sharded(self.rank, Partition(0, world_size, ((state.rank, state.rank + 1),)))

    def get_rank(self) -> Tensor:
        """int32 ``[1]``."""
        return self.rank
