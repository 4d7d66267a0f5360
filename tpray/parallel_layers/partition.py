"""Which part of a whole tensor a rank's parameter is.

A sharded parameter carries neuronx-distributed's attributes, ``tensor_model_parallel`` (True), ``partition_dim``,
``partition_stride``, ``num_partitions`` and ``rank_ordering``, and one of tpray's, ``partition``: all that reading and
writing checkpoints needs. A parameter that was marked by upstream's attributes alone is as good.

Legend: T tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpray.errors import ConfigError, DegreeError
from tpray.parallel_layers import parallel_state

Bounds = Sequence[tuple[int, int]]
RankOrdering = Sequence[int]
"""Item i is the number of the part that rank i holds."""


@dataclass(frozen=True)
class Partition:
    """Which part of a whole tensor a parameter is: along ``dim`` of ``full`` elements, these [start, stop) pieces.

    stride: see `shard_bounds`. transposed: checkpoints hold the whole tensor with its two dimensions exchanged.
    padding: how many zeros follow, so that all ranks' parts are of one size. even: the ranks' parts, by the rule of
    `shard_bounds`, make up the whole; not so where parts differ in size or are held by several ranks.
    """

    dim: int
    full: int
    bounds: tuple[tuple[int, int], ...]
    stride: int = 1
    transposed: bool = False
    padding: int = 0
    even: bool = True

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


def take(x: Tensor, dim: int, part: Partition) -> Tensor:
    """This rank's part of an x that is whole along ``dim``: what `Partition.cut` is for weights.

    Which they are goes into a traced program as a tensor: the ranks' programs are the same then, and one compiled by
    Neuron's compiler is found in its cache by the others.
    """
    items = [i for start, stop in part.bounds for i in range(start, stop)]
    if part.even and part.own * parallel_state.current().size > part.full:  # what pads it lies behind the whole
        x = torch.cat([x, x.new_zeros([1 if i == dim % x.dim() else size for i, size in enumerate(x.shape)])], dim)
        items += [part.full] * part.padding
    return x.index_select(dim, torch.tensor(items).to(x.device))


def own_part(x: Tensor, dim: int) -> Tensor:
    """This rank's of the T equal parts of x along ``dim``; see `take`.

    Raises:
        DegreeError: T does not divide it.
    """
    state = parallel_state.current()
    full = x.shape[dim]
    if full % state.size:
        raise DegreeError(f"a dimension of {full} does not divide into {state.size} ranks")
    return take(x, dim, Partition(dim, full, shard_bounds(full, state.rank, state.size)))


def shard_bounds(full: int, rank: int, size: int, stride: int = 1) -> tuple[tuple[int, int], ...]:
    """Which [start, stop) pieces of a dimension of ``full`` elements belong to ``rank``, all ranks alike.

    With stride s the dimension is cut into s * T chunks and a rank owns every T-th, so that fused
    parameters (q, k and v in one) are cut inside each of their parts.
    """
    chunk = full // size // stride
    starts = ((part * size + rank) * chunk for part in range(stride))
    return tuple((start, start + chunk) for start in starts)


def partition(
    what: str,
    dim: int,
    full: int,
    stride: int = 1,
    bounds: Bounds | None = None,
    align: int = 0,
    ordering: RankOrdering | None = None,
) -> Partition:
    """This rank's part of a dimension. what: its name in an error, with an article.

    Args:
        bounds: of this rank, where shares differ; nothing else is looked at then.
        align: fill the last shares with zeros up to a multiple of this number; 0: do not.
        ordering: see `RankOrdering`; None: rank i holds part i.

    Raises:
        DegreeError: T times the stride does not divide ``full``.
    """
    state = parallel_state.current()
    if bounds is not None:
        return Partition(dim, full, tuple(bounds), even=False)
    number = state.rank if ordering is None else ordering[state.rank]
    if align and full % (state.size * align):
        if stride > 1:
            raise ConfigError(f"{what} of {full} cannot be padded with stride {stride}: leave one of them out")
        return padded(dim, full, -(-full // (state.size * align)) * align, number)
    if full % (state.size * stride):
        raise DegreeError(
            f"{what} of {full} does not divide into {state.size} ranks"
            + (f" with stride {stride}" if stride > 1 else "")
        )
    return Partition(dim, full, shard_bounds(full, number, state.size, stride), stride)


def padded(dim: int, full: int, share: int, number: int) -> Partition:
    """Part ``number`` of shares of ``share`` elements, the last ones filled with zeros."""
    start, stop = (min(full, share * n) for n in (number, number + 1))
    return Partition(dim, full, ((start, stop),), padding=share - (stop - start))


def check_ordering(ordering: RankOrdering | None) -> RankOrdering | None:
    """A rank ordering as it is; None for the usual order.

    Raises:
        ConfigError: it is not a permutation of this group's ranks.
    """
    size = parallel_state.get_tensor_model_parallel_size()
    if ordering is not None and sorted(ordering) != list(range(size)):
        raise ConfigError(f"rank_ordering {list(ordering)} must have each of the ranks 0 to {size - 1} once")
    return None if ordering is None or list(ordering) == list(range(size)) else ordering


def mark_sharded(parameter: Tensor, part: Partition, ordering: RankOrdering | None = None) -> None:
    """Say that ``parameter`` is this rank's part of a larger one."""
    state = parallel_state.current()
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # upstream's way to carry this
    parameter.partition_dim = part.dim  # type: ignore[attr-defined]
    parameter.partition_stride = part.stride  # type: ignore[attr-defined]
    parameter.num_partitions = state.size  # type: ignore[attr-defined]
    parameter.rank_ordering = None if ordering is None else list(ordering)  # type: ignore[attr-defined]
    parameter.partition = part  # type: ignore[attr-defined]


def partition_of(parameter: Tensor) -> Partition | None:
    """What `mark_sharded`, or upstream's attributes, say of a parameter; None for one that is whole."""
    known: Partition | None = getattr(parameter, "partition", None)
    if known is not None or not is_sharded(parameter):
        return known
    dim, stride, size = (getattr(parameter, name) for name in ("partition_dim", "partition_stride", "num_partitions"))
    full = parameter.shape[dim] * size
    number = part_number(parameter, parallel_state.current().rank) % size
    return Partition(dim, full, shard_bounds(full, number, size, stride), stride)


def part_number(parameter: Tensor, rank: int) -> int:
    """Which of the whole's parts ``rank`` holds of a sharded parameter."""
    ordering: RankOrdering | None = getattr(parameter, "rank_ordering", None)
    return rank if ordering is None else ordering[rank]


def is_sharded(parameter: Tensor) -> bool:
    """Whether ``parameter`` is one rank's part of a larger one."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


@torch.no_grad()
def fill(parameter: nn.Parameter, init: object, full_shape: Sequence[int]) -> nn.Parameter | None:
    """Give a parameter its first values: its part of a whole that ``init`` is called on, so that ranks agree.

    Returns:
        The whole; None on the meta device, where there are no values.
    """
    if parameter.is_meta or parallel_state.get_aot_mode():
        return None
    assert callable(init), "an init method takes a tensor"
    whole = nn.Parameter(torch.empty(tuple(full_shape)), requires_grad=False)
    init(whole)
    part = partition_of(parameter)
    parameter.copy_(whole if part is None else part.cut(whole))
    return whole
