"""The query, key and value projections of grouped-query attention, with key/value heads that ranks may share.

Legend: B batch, S sequence, I input features, Q and K output features of the query and of each of key and value,
T tensor-parallel degree, M how many ranks share a key/value head.

Source of names and arguments: neuronx-distributed's ``modules.qkv_linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpray.errors import ConfigError, DegreeError
from tpray.parallel_layers import collective
from tpray.parallel_layers.base import BaseParallelLinear, Device, InitMethod
from tpray.parallel_layers.partition import Partition, shard_bounds


class GQAQKVColumnParallelLinear(BaseParallelLinear):
    """Three column-parallel linear layers in one: ``q, k, v = layer(x)``.

    Ranks r with the same r // M hold the same part of key and value, so that the query heads of a rank, in their usual
    order, find their key/value heads there. A whole checkpoint needs no rearranging. (Upstream does so on Trn2; for
    Trn1 it deals the parts out the other way, and its converter puts the query heads in that order.)

    Args:
        input_size: I.
        output_sizes: Q and K.
        bias: whether there are biases.
        gather_output: True: every rank returns all features, for which M must be 1; False: its own.
        dtype, device, init_method, keep_master_weight, reduce_dtype: as in `ColumnParallelLinear`.
        sequence_parallel_enabled: x is this rank's part of the sequence, ``[S/T, B, I]``, and is gathered first.
        kv_size_multiplier: M; it must divide T, and T / M must divide K.
        fuse_qkv: True: one parameter, ``weight_qkv``, of which a checkpoint holds query, key and value one under
            another; False: ``weight_q``, ``weight_k`` and ``weight_v``. Biases likewise.

    Raises:
        DegreeError: T does not divide Q, or T / M does not divide K.
        ConfigError: arguments that do not go together.
    """

    weight_qkv: nn.Parameter | None
    weight_q: nn.Parameter | None
    weight_k: nn.Parameter | None
    weight_v: nn.Parameter | None
    bias_qkv: nn.Parameter | None
    bias_q: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        init_method: InitMethod | None = None,
        sequence_parallel_enabled: bool = False,
        keep_master_weight: bool = False,
        kv_size_multiplier: int = 1,
        fuse_qkv: bool = True,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device)
        q, kv = output_sizes
        shared = kv_size_multiplier
        if shared < 1 or self.tp_size % shared:
            raise ConfigError(f"kv_size_multiplier {shared} must divide the degree, which is {self.tp_size}")
        if gather_output and shared > 1:
            raise ConfigError("key and value heads that ranks share are not gathered: give gather_output=False")
        if gather_output and sequence_parallel_enabled:
            raise ConfigError("a sequence-parallel layer keeps its part of the output: give gather_output=False")
        holders = self.tp_size // shared
        if q % self.tp_size or kv % holders:
            raise DegreeError(
                f"output sizes of {q} for the query and {kv} for key and value do not divide into {self.tp_size} and "
                f"{holders} parts"
            )
        self.input_size, self.output_sizes, self.use_bias = input_size, list(output_sizes), bias
        self.gather_output, self.fuse_qkv, self.kv_size_multiplier = gather_output, fuse_qkv, shared
        self.sequence_parallel_enabled, self.reduce_dtype = sequence_parallel_enabled, reduce_dtype
        self.dtype, self.arg_init_method, self.keep_master_weight = dtype, init_method, keep_master_weight
        self.q_output_size_per_partition, self.kv_output_size_per_partition = q // self.tp_size, kv // holders
        of_q = shard_bounds(q, self.tp_rank, self.tp_size)
        of_kv = shard_bounds(kv, self.tp_rank // shared, holders)
        parts = {
            "q": Partition(0, q, of_q),
            "k": Partition(0, kv, of_kv, even=shared == 1),
            "v": Partition(0, kv, of_kv, even=shared == 1),
        }
        if fuse_qkv:
            starts = (0, of_q), (q, of_kv), (q + kv, of_kv)
            bounds = tuple((start + a, start + b) for start, pieces in starts for a, b in pieces)
            parts = {"qkv": Partition(0, q + 2 * kv, bounds, even=False)}
        for name in ("q", "k", "v", "qkv"):
            self._make(name, parts.get(name))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, S, I]``, the same on every rank -> ``[B, S, Q/T]`` and twice ``[B, S, M K/T]``, or Q, K, K."""
        if self.sequence_parallel_enabled and self.tp_size > 1:
            input = collective.all_gather(input, dim=0)
        sizes = [self.q_output_size_per_partition, *[self.kv_output_size_per_partition] * 2]
        biases: list[Tensor | None] = [self.bias_q, self.bias_k, self.bias_v]
        if self.fuse_qkv:
            assert self.weight_qkv is not None, "fused"
            outputs = list(F.linear(input, self.weight_qkv).split(sizes, -1))
            if self.bias_qkv is not None:
                q, kv = self.output_sizes
                biases = list(self.bias_qkv.split([q, kv, kv] if self.gather_output else sizes))
        else:
            weights = (self.weight_q, self.weight_k, self.weight_v)
            outputs = [F.linear(input, weight) for weight in weights if weight is not None]
        if self.gather_output and self.tp_size > 1:
            outputs = [collective.all_gather(y, dim=-1) for y in outputs]
        q, k, v = (y if bias is None else y + bias for y, bias in zip(outputs, biases, strict=True))
        return q, k, v

    def _make(self, name: str, part: Partition | None) -> None:
        """Make ``weight_name`` and ``bias_name``, which are None without a part."""
        weight = bias = whole = None
        if part is not None:
            weight, whole = self.make_parameter(
                (part.own, self.input_size), self.dtype, part, self._init_weight, (part.full, self.input_size)
            )
            if self.use_bias:
                size = part.full if self.gather_output else part.own
                own = None if self.gather_output else part
                bias, _ = self.make_parameter((size,), self.dtype, own, nn.init.zeros_, (part.full,))
        self.register_parameter(f"weight_{name}", weight)
        self.register_parameter(f"bias_{name}", bias)
        self.__dict__[f"master_weight_{name}"] = whole if self.keep_master_weight else None
