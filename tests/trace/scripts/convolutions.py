"""A residual block of convolutions: channels shared out by output, then by input; sizes that are padded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.trace.scripts.script import Script, noise, settled
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import InputChannelParallelConv2d, OutputChannelParallelConv2d
from tpray.trace.trace import get_sharded_checkpoint


class Block(nn.Module):
    """Sizes: 5 channels, 10 within; the last convolution takes its part of a whole input."""

    def __init__(self, first: Any, second: Any, third: Any, fourth: Any) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = first, second, third, fourth

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = x + self.second(nn.functional.silu(self.first(x)))
        z = self.third(y)
        return self.fourth(z), {"between": y, "gathered": z}


def whole() -> nn.Module:
    return settled(
        Block(
            nn.Conv2d(5, 10, 3, padding=1),
            nn.Conv2d(10, 5, (3, 1), padding=(1, 0)),
            nn.Conv2d(5, 7, 3, 2),
            nn.Conv2d(7, 4, 1),
        )
    )


def make() -> nn.Module:
    state = parallel_state.current()
    block = Block(
        OutputChannelParallelConv2d(5, 10, 3, padding=1, gather_output=False, partition_pad=True),
        InputChannelParallelConv2d(10, 5, (3, 1), padding=(1, 0), input_is_parallel=True, partition_pad=True),
        OutputChannelParallelConv2d(5, 7, 3, 2, partition_pad=True),
        InputChannelParallelConv2d(7, 4, 1, partition_pad=True),
    )
    checkpoint = whole().state_dict()
    get_sharded_checkpoint(checkpoint, block, state.rank, state.size)
    block.load_state_dict(checkpoint)
    return block


SCRIPT = Script("convolutions", make, [(noise(2, 5, 9, 8, seed=1),), (noise(2, 5, 9, 8, seed=2),)], whole, (2, 3, 4))
