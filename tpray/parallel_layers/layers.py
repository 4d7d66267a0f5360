"""Column- and row-parallel linear layers and the parallel embedding.

Legend: B batch, S sequence, I input features, O output features, V vocabulary, D embedding width,
T tensor-parallel degree.

Names, arguments and meaning follow neuronx-distributed's ``parallel_layers.layers``, which follows
Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053). They are for inference: no gradient crosses a
collective.

A sharded parameter carries upstream's three attributes, ``tensor_model_parallel`` (True), ``partition_dim`` and
``partition_stride``, and one of tpray's, ``partition``: all that reading and writing checkpoints needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpray.errors import ConfigError, DegreeError
from tpray.parallel_layers import collective, parallel_state

InitMethod = Callable[[Tensor], object]
Bounds = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Partition:
    """Which part of a whole tensor a parameter is: along ``dim`` of ``full`` elements, these [start, stop) pieces.

    stride: see `shard_bounds`. transposed: checkpoints hold the whole tensor with its two dimensions exchanged.
    padding: how many zeros follow, so that all ranks' parts are of one size.
    """

    dim: int
    full: int
    bounds: tuple[tuple[int, int], ...]
    stride: int = 1
    transposed: bool = False
    padding: int = 0

    @property
    def own(self) -> int:
        """How many elements along ``dim`` this part has."""
        return sum(stop - start for start, stop in self.bounds) + self.padding

    def cut(self, whole: Tensor) -> Tensor:
        """This part of ``whole``, which is not transposed."""
        return self.join([whole.narrow(self.dim, start, stop - start) for start, stop in self.bounds])

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The part that its ``pieces``, one for each of the bounds, make up; the padding is added."""
        part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)
        if not self.padding:
            return part
        shape = list(part.shape)
        shape[self.dim] = self.padding
        return torch.cat([part, part.new_zeros(shape)], self.dim)


def mark_sharded(parameter: nn.Parameter, partition: Partition) -> None:
    """Say that ``parameter`` is this rank's part of a larger one."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # upstream's way to carry this
    parameter.partition_dim = partition.dim  # type: ignore[attr-defined]
    parameter.partition_stride = partition.stride  # type: ignore[attr-defined]
    parameter.partition = partition  # type: ignore[attr-defined]


def partition_of(parameter: Tensor) -> Partition | None:
    """What `mark_sharded` said; None for a parameter that is whole."""
    return getattr(parameter, "partition", None)


def is_sharded(parameter: Tensor) -> bool:
    """Whether ``parameter`` is one rank's part of a larger one."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def shard_bounds(full: int, rank: int, size: int, stride: int = 1) -> tuple[tuple[int, int], ...]:
    """Which [start, stop) pieces of a dimension of ``full`` elements belong to ``rank``, all ranks alike.

    With stride s the dimension is cut into s * T chunks and a rank owns every T-th, so that fused
    parameters (q, k and v in one) are cut inside each of their parts.
    """
    chunk = full // size // stride
    starts = ((part * size + rank) * chunk for part in range(stride))
    return tuple((start, start + chunk) for start in starts)


class _ParallelLayer(nn.Module):
    """What the three layers share: this rank, its group's size, and how parameters are made."""

    def __init__(self) -> None:
        super().__init__()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_size()

    def _partition(
        self, what: str, dim: int, full: int, stride: int = 1, bounds: Bounds | None = None, pad: bool = False
    ) -> Partition:
        if bounds is not None:
            return Partition(dim, full, tuple(bounds))
        if pad and full % self.tp_size:
            if stride > 1:
                raise ConfigError(f"{what} of {full} cannot be padded with stride {stride}: leave one of them out")
            share = -(-full // self.tp_size)
            start, stop = (min(full, share * rank) for rank in (self.tp_rank, self.tp_rank + 1))
            return Partition(dim, full, ((start, stop),), padding=share - (stop - start))
        if full % (self.tp_size * stride):
            raise DegreeError(
                f"{what} of {full} does not divide into {self.tp_size} ranks"
                + (f" with stride {stride}" if stride > 1 else "")
            )
        return Partition(dim, full, shard_bounds(full, self.tp_rank, self.tp_size, stride), stride)

    def _parameter(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str | None,
        partition: Partition | None,
    ) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        if partition is not None:
            mark_sharded(parameter, partition)
        return parameter


class ColumnParallelLinear(_ParallelLayer):
    """``y = x W^T + b`` with the rows of W (the output features) shared out among the ranks.

    Args:
        input_size: I.
        output_size: O, of the whole layer; T must divide it.
        bias: whether there is b.
        gather_output: True: every rank returns y ``[B, S, O]``; False: each returns its own
            ``[B, S, O/T]``, which is what a `RowParallelLinear` with ``input_is_parallel`` takes.
        dtype, device: of the parameters.
        stride: see `shard_bounds`.
        init_method: called on the weight; the default is `torch.nn.Linear`'s.
        skip_bias_add: return ``(x W^T, b)`` instead, for a caller that fuses the addition.
        pad: let T not divide O: zeros fill the last ranks' shares, and are cut off a gathered output.
        sequence_parallel_enabled, sequence_dimension: x is this rank's part of the sequence, ``[B, S/T, I]`` if the
            dimension is 1, and is gathered first. Source: arXiv:2205.05198, section 4.2.2.
        bounds: this rank's [start, stop) pieces of the output features, where shares differ from rank to rank;
            then T need not divide O, and the output cannot be gathered.

    Parameters: weight ``[O/T, I]``; bias ``[O/T]``, or ``[O]`` when the output is gathered: it is added
    after the gather then.

    Raises:
        DegreeError: T does not divide O.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        stride: int = 1,
        init_method: InitMethod | None = None,
        skip_bias_add: bool = False,
        pad: bool = False,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = 0,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        if gather_output and bounds is not None:
            raise ConfigError("shares that differ cannot be gathered: bounds need gather_output=False")
        self.input_size, self.output_size = input_size, output_size
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, sequence_dimension
        part = self._partition("an output size", 0, output_size, stride, bounds, pad)
        self.weight = self._parameter((part.own, input_size), dtype, device, part)
        self.bias = None
        if bias and gather_output:
            self.bias = self._parameter((output_size,), dtype, device, None)
        elif bias:
            self.bias = self._parameter((part.own,), dtype, device, part)
        _init(self.weight, self.bias, init_method)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """x ``[..., I]``, the same on every rank -> ``[..., O]`` or ``[..., O/T]``."""
        if self.sequence_parallel_enabled and self.tp_size > 1:
            x = collective.all_gather(x, dim=self.sequence_dimension)
        late_bias = self.gather_output or self.skip_bias_add
        y = F.linear(x, self.weight, None if late_bias else self.bias)
        if self.gather_output and self.tp_size > 1:
            y = collective.all_gather(y, dim=-1)[..., : self.output_size]
        return _add_bias(y, self.bias if late_bias else None, self.skip_bias_add)


class RowParallelLinear(_ParallelLayer):
    """``y = x W^T + b`` with the columns of W (the input features) shared out among the ranks.

    Args:
        input_size: I, of the whole layer; T must divide it.
        output_size: O.
        bias: whether there is b. It is whole on every rank and added once, after the all-reduce.
        input_is_parallel: True: x is this rank's ``[..., I/T]`` (the output of a `ColumnParallelLinear`
            with ``gather_output=False``); False: x is ``[..., I]`` and each rank takes its part.
        dtype, device: of the parameters.
        stride, init_method, skip_bias_add: as in `ColumnParallelLinear`.
        reduce_output: False leaves the partial sum of this rank, for a caller that reduces later.
        reduce_dtype: what the all-reduce carries, when wider than x; sums of narrower tensors are
            accumulated in float32 in any case.
        pad: let T not divide I: zeros fill the last ranks' shares, of the weight and of a whole x.
        sequence_parallel_enabled, sequence_dimension: y is this rank's part of the sequence, ``[B, S/T, O]`` if the
            dimension is 1; T must divide S. The sum is all-reduced and cut: more moves than a reduce-scatter needs.
        bounds: this rank's [start, stop) pieces of the input features, where shares differ from rank to rank;
            then T need not divide I.

    Parameters: weight ``[O, I/T]``, bias ``[O]``.

    Raises:
        DegreeError: T does not divide I.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        stride: int = 1,
        init_method: InitMethod | None = None,
        skip_bias_add: bool = False,
        reduce_output: bool = True,
        reduce_dtype: torch.dtype | None = None,
        pad: bool = False,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = 0,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        self.reduce_output, self.reduce_dtype, self.stride = reduce_output, reduce_dtype, stride
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, sequence_dimension
        if sequence_parallel_enabled and not reduce_output:
            raise ConfigError("a sequence-parallel output is a reduced one: leave reduce_output=True")
        self.part = self._partition("an input size", 1, input_size, stride, bounds, pad)
        self.weight = self._parameter((output_size, self.part.own), dtype, device, self.part)
        self.bias = self._parameter((output_size,), dtype, device, None) if bias else None
        _init(self.weight, self.bias, init_method)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """x ``[..., I/T]`` or ``[..., I]`` -> ``[..., O]``, the same on every rank when reduced."""
        if not self.input_is_parallel and self.tp_size > 1:
            x = F.pad(torch.cat([x[..., start:stop] for start, stop in self.part.bounds], -1), (0, self.part.padding))
        y = F.linear(x, self.weight)
        if self.reduce_output and self.tp_size > 1:
            wide = self.reduce_dtype or y.dtype
            y = collective.all_reduce(y.to(wide)).to(y.dtype)
            if self.sequence_parallel_enabled:
                y = y.chunk(self.tp_size, self.sequence_dimension)[self.tp_rank]
        return _add_bias(y, self.bias, self.skip_bias_add)


class ParallelEmbedding(_ParallelLayer):
    """A lookup table shared out among the ranks, by vocabulary or by embedding width.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        padding_idx: kept for `torch.nn.Embedding`'s sake; it has no effect on inference.
        shard_across_embedding: False: each rank holds V/T rows, looks up the ids that are its own, and an
            all-reduce adds the zeros of the others; True: each holds D/T columns and an all-gather joins
            them.
        dtype, device, init_method: as in `ColumnParallelLinear`; the default start is normal(0, 1).
        bounds: this rank's [start, stop) of the vocabulary, one piece, where shares differ from rank to rank.

    Parameters: weight ``[V/T, D]`` or ``[V, D/T]``. Buffer: first int64 ``[1]``, the rank's first id, of a vocabulary.

    Raises:
        DegreeError: T does not divide V, or D.
    """

    first: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init_method: InitMethod | None = None,
        shard_across_embedding: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        if shard_across_embedding and bounds is not None:
            raise ConfigError("shares that differ cannot be gathered: bounds are of the vocabulary")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.shard_across_embedding = padding_idx, shard_across_embedding
        if shard_across_embedding:
            part = self._partition("an embedding width", 1, embedding_dim)
            self.weight = self._parameter((num_embeddings, part.own), dtype, device, part)
        else:
            part = self._partition("a vocabulary", 0, num_embeddings, bounds=bounds)
            ((first, _),) = part.bounds
            # Not a number, so that the ranks' programs are the same; nor a scalar, of which torch-xla makes a number.
            self.register_buffer("first", torch.tensor([first], device=torch.device("cpu")), persistent=False)
            self.weight = self._parameter((part.own, embedding_dim), dtype, device, part)
        self.part = part
        with torch.no_grad():
            (init_method or nn.init.normal_)(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 ``[B, S]``, the same on every rank -> ``[B, S, D]`` on every rank."""
        if self.tp_size == 1:
            return F.embedding(ids, self.weight)
        if self.shard_across_embedding:
            return collective.all_gather(F.embedding(ids, self.weight), dim=-1)
        own = ids - self.first
        foreign = (own < 0) | (own >= len(self.weight))
        found = F.embedding(own.masked_fill(foreign, 0), self.weight)
        return collective.all_reduce(found.masked_fill(foreign.unsqueeze(-1), 0.0))


@torch.no_grad()
def _init(weight: Tensor, bias: Tensor | None, init_method: InitMethod | None) -> None:
    if init_method is not None:
        init_method(weight)
    else:
        nn.init.kaiming_uniform_(weight, a=5**0.5)  # torch.nn.Linear's
    if bias is not None:
        bias.zero_()


def _add_bias(y: Tensor, bias: Tensor | None, skip: bool) -> Tensor | tuple[Tensor, Tensor | None]:
    if skip:
        return y, bias
    return y if bias is None else y + bias
