"""A lookup table shared out among the ranks.

Legend: B batch, S sequence, V vocabulary, D embedding width, T tensor-parallel degree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpray.errors import ConfigError
from tpray.parallel_layers import collective, parallel_state
from tpray.parallel_layers.base import BaseParallelLayer, Device, InitMethod
from tpray.parallel_layers.partition import Bounds, RankOrdering, check_ordering, own_part, partition
from tpray.parallel_layers.spmd_rank import SPMDRank


class ParallelEmbedding(BaseParallelLayer):
    """A lookup table shared out among the ranks, by vocabulary or by embedding width.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        max_norm, norm_type: a row that is longer than this, by its ``norm_type``-norm, is returned shortened to it; the
            stored row stays as it is.
        padding_idx, scale_grad_by_freq, sparse: kept for `torch.nn.Embedding`'s sake; they are about gradients.
        init_method: called on the whole weight, of which each rank takes its part; the default is normal(0, 1).
        device, dtype: of the parameters.
        shard_across_embedding: False: each rank holds V/T rows, looks up the ids that are its own, and an
            all-reduce adds the zeros of the others; True: each holds D/T columns and an all-gather joins
            them.
        pad: let T not divide V, or D: zeros fill the last ranks' shares.
        sequence_parallel_enabled, sequence_dimension: of a vocabulary, as upstream: without a dimension, or with 0,
            each rank returns its part of the sequence, which comes first, ``[S/T, B, D]``; with another dimension it
            returns its own ``[B, S, D]``, which the caller must sum.
        tensor_model_parallel_group: None, or the group of all ranks.
        use_spmd_rank: read the rank from a parameter, ``rank_util.rank``; see `SPMDRank`.
        tile_cc: how Neuron's compiler splits collectives; not used.
        rank_ordering: item i is the number of the part that rank i holds. Not for an output that is gathered.
        collect_output: False leaves what this rank looked up: its summand, or its columns.
        bounds: this rank's [start, stop) of the vocabulary, one piece, where shares differ from rank to rank.

    Parameters: weight ``[V/T, D]`` or ``[V, D/T]``.

    Raises:
        DegreeError: T does not divide V, or D.
        ConfigError: arguments that do not go together.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_method: InitMethod = nn.init.normal_,
        device: Device = None,
        dtype: torch.dtype = torch.float32,
        shard_across_embedding: bool = False,
        pad: bool = False,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: object = None,
        use_spmd_rank: bool = False,
        sequence_dimension: int | None = None,
        tile_cc: bool = False,
        rank_ordering: RankOrdering | None = None,
        collect_output: bool = True,
        *,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__(device)
        parallel_state.check_group(tensor_model_parallel_group)
        self.rank_ordering = check_ordering(rank_ordering)
        by_width = shard_across_embedding
        if by_width and bounds is not None:
            raise ConfigError("shares that differ cannot be gathered: bounds are of the vocabulary")
        if by_width and collect_output and self.rank_ordering is not None:
            raise ConfigError("parts in another order are not gathered: rank_ordering needs a split by vocabulary")
        if by_width and max_norm is not None and not collect_output:
            raise ConfigError("the length of a row is known only when it is whole: max_norm needs collect_output=True")
        if use_spmd_rank and (self.rank_ordering is not None or bounds is not None):
            raise ConfigError("use_spmd_rank is for parts in the usual order: leave rank_ordering and bounds out")
        what = "an embedding width" if by_width else "a vocabulary"
        full = embedding_dim if by_width else num_embeddings
        self.part = partition(what, int(by_width), full, 1, bounds, int(pad), self.rank_ordering)
        self.num_embeddings, self.embedding_dim, self.pad = num_embeddings, embedding_dim, pad
        self.pad_size = self._padding_of(self.part)
        self.num_embeddings_per_partition = num_embeddings if by_width else self.part.own
        self.embedding_dim_per_partition = self.part.own if by_width else embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.shard_across_embedding, self.collect_output, self.dtype = by_width, collect_output, dtype
        self.sequence_parallel_enabled, self.sequence_dim = sequence_parallel_enabled, sequence_dimension
        self.rank_util = SPMDRank(self.tp_size) if use_spmd_rank else None
        shape = self.num_embeddings_per_partition, self.embedding_dim_per_partition
        self.weight, _ = self.make_parameter(shape, dtype, self.part, init_method, (num_embeddings, embedding_dim))

    def forward(self, input_: Tensor) -> Tensor:
        """ids int64 ``[B, S]``, the same on every rank -> ``[B, S, D]`` on every rank."""
        if self.shard_across_embedding:
            return self._from_columns(input_)
        found = self._summand(input_)
        if not self.collect_output or (self.sequence_parallel_enabled and self.sequence_dim):
            return found
        if self.tp_size == 1:
            return found.transpose(0, 1) if self.sequence_parallel_enabled else found
        if self.sequence_parallel_enabled:
            total = collective.all_reduce(found.transpose(0, 1).contiguous())
            return own_part(total, 0)
        return collective.all_reduce(found)

    def _from_columns(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.weight)
        if not self.collect_output:
            return found
        if self.tp_size > 1:
            found = collective.all_gather(found, dim=-1)[..., : self.embedding_dim]
        return self._shortened(found)

    def _summand(self, ids: Tensor) -> Tensor:
        """The rows of the ids that are this rank's, and zeros for those of others."""
        if self.tp_size == 1:
            return self._shortened(F.embedding(ids, self.weight))
        ((start, _),) = self.part.bounds
        # Not a number, so that the ranks' programs are the same; nor a scalar, of which torch-xla makes a number.
        first = torch.tensor([start])
        if self.rank_util is not None:
            first = self.rank_util.get_rank().long() * self.part.own
        own = ids - first.to(ids.device)
        foreign = (own < 0) | (own >= len(self.weight))
        found = self._shortened(F.embedding(own.masked_fill(foreign, 0), self.weight))
        return found.masked_fill(foreign.unsqueeze(-1), 0.0)

    def _shortened(self, rows: Tensor) -> Tensor:
        if self.max_norm is None:
            return rows
        length = torch.linalg.vector_norm(rows, self.norm_type, -1, keepdim=True)
        # Source of the small number: torch's embedding_renorm.
        return torch.where(length > self.max_norm, rows * (self.max_norm / (length + 1e-7)), rows)
