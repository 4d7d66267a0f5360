"""Two-dimensional convolutions with their output or input channels shared out among the ranks.

Legend: N batch, C input channels, O output channels, H and W height and width, T tensor-parallel degree.

Source of names and arguments: neuronx-distributed's ``parallel_layers.layers``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpray.errors import ConfigError
from tpray.parallel_layers import collective
from tpray.parallel_layers.base import BaseParallelLayer, Device, InitMethod
from tpray.parallel_layers.partition import partition, take

Pair = int | tuple[int, int]

CONV_KERNEL_OUTPUT_CHANNEL_DIMENSION = 0
CONV_KERNEL_INPUT_CHANNEL_DIMENSION = 1


class BaseParallelConv(BaseParallelLayer):
    """What the two have in common; a weight ``[O, C, *kernel_size]`` is cut along ``partition_dim``.

    Raises:
        DegreeError: T does not divide the channels, and ``partition_pad`` is not given.
        ConfigError: groups, or a padding that is not of zeros.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        bias: bool,
        padding_mode: str,
        partition_dim: int,
        dtype: torch.dtype,
        device: Device = None,
        init_method: InitMethod | None = None,
        keep_master_params: bool = False,
        partition_pad: bool = False,
    ) -> None:
        super().__init__(device)
        if groups != 1:
            raise ConfigError(f"a parallel convolution has no groups, and {groups} were given: use torch.nn.Conv2d")
        if isinstance(padding, str):
            raise ConfigError(f"a parallel convolution takes its padding as numbers, not as {padding!r}")
        if padding_mode != "zeros":
            raise ConfigError(
                f"a parallel convolution pads with zeros, not by {padding_mode!r}: pad its input before it"
            )
        by_output = partition_dim == CONV_KERNEL_OUTPUT_CHANNEL_DIMENSION
        what, full = ("output", out_channels) if by_output else ("input", in_channels)
        self.part = partition(f"{what} channels", partition_dim, full, align=int(partition_pad))
        self.partition_dim, self.partition_pad, self.channels_per_partition = (
            partition_dim,
            partition_pad,
            self.part.own,
        )
        self.partition_pad_size = self._padding_of(self.part)
        self.in_channels = in_channels + (0 if by_output else self.partition_pad_size)  # as upstream: with the padding
        self.out_channels = out_channels + (self.partition_pad_size if by_output else 0)
        self.kernel_size, self.stride, self.padding, self.dilation = map(
            _as_tuple2, (kernel_size, stride, padding, dilation)
        )
        self.dtype, self.add_bias, self.arg_init_method = dtype, bias, init_method
        shape, full_shape = (
            [out_channels, in_channels, *self.kernel_size],
            [out_channels, in_channels, *self.kernel_size],
        )
        shape[partition_dim] = self.part.own
        self.weight, whole = self.make_parameter(shape, dtype, self.part, init_method or _conv_init, full_shape)
        self.__dict__["master_weight"] = whole if keep_master_params else None
        self.bias = None
        if bias:
            part = self.part if by_output else None
            size = self.part.own if by_output else out_channels
            self.bias, whole = self.make_parameter((size,), dtype, part, nn.init.zeros_, (out_channels,))
            self.__dict__["master_bias"] = whole if keep_master_params else None

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation)


class OutputChannelParallelConv2d(BaseParallelConv):
    """`torch.nn.Conv2d` with its output channels shared out.

    Args:
        in_channels: C.
        out_channels: O, of the whole layer.
        kernel_size, stride, padding, dilation: as of `torch.nn.Conv2d`.
        groups, padding_mode: refused unless they are the defaults.
        bias: whether there is one; each rank adds its part.
        gather_output: True: every rank returns all channels; False: its own.
        dtype, device, init_method: of the parameters, as in `ColumnParallelLinear`.
        keep_master_weight: keep the whole weight and bias as they were at first.
        partition_pad: let T not divide O: zeros fill the last ranks' shares, and are cut off a gathered output.

    Parameters: weight ``[O/T, C, *kernel_size]``, bias ``[O/T]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        init_method: InitMethod | None = None,
        keep_master_weight: bool = False,
        partition_pad: bool = False,
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        super().__init__(
            *shape, CONV_KERNEL_OUTPUT_CHANNEL_DIMENSION, dtype, device, init_method, keep_master_weight, partition_pad
        )
        self.gather_output = gather_output

    def forward(self, in_tensor: Tensor) -> Tensor:
        """``[N, C, H, W]``, the same on every rank -> ``[N, O, H', W']`` or ``[N, O/T, H', W']``."""
        y = self._convolve(in_tensor, self.bias)
        if self.gather_output and self.tp_size > 1:
            y = collective.all_gather(y, dim=1)
            y = y.narrow(1, 0, self.out_channels - self.partition_pad_size)
        return y


class InputChannelParallelConv2d(BaseParallelConv):
    """`torch.nn.Conv2d` with its input channels shared out; an all-reduce sums what each rank computes.

    Args:
        input_is_parallel: True: the input is this rank's channels (the output of an `OutputChannelParallelConv2d` with
            ``gather_output=False``); False: it is whole, and each rank takes its part.
        partition_pad: let T not divide C: zeros fill the last ranks' shares, of the weight and of a whole input.
        the others: as in `OutputChannelParallelConv2d`.

    Parameters: weight ``[O, C/T, *kernel_size]``, bias ``[O]``, which is added once, after the sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        init_method: InitMethod | None = None,
        keep_master_weight: bool = False,
        partition_pad: bool = False,
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        super().__init__(
            *shape, CONV_KERNEL_INPUT_CHANNEL_DIMENSION, dtype, device, init_method, keep_master_weight, partition_pad
        )
        self.input_is_parallel = input_is_parallel

    def forward(self, in_tensor: Tensor) -> Tensor:
        """``[N, C/T, H, W]`` or ``[N, C, H, W]`` -> ``[N, O, H', W']``, the same on every rank."""
        if not self.input_is_parallel and self.tp_size > 1:
            in_tensor = take(in_tensor, 1, self.part)
        y = self._convolve(in_tensor, None)
        if self.tp_size > 1:
            y = collective.all_reduce(y)
        return y if self.bias is None else y + self.bias[:, None, None]


def _as_tuple2(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def conv2d_with_weight_grad_allreduce(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    allreduce_weight_grad: bool,
) -> Tensor:
    """``[N, C, H, W]`` -> ``[N, O, H', W']``. allreduce_weight_grad: about gradients; not used."""
    return F.conv2d(input, weight, bias, stride, padding)


def _conv_init(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)  # torch.nn.Conv2d's
