"""Rows of different lengths end to end as one long row, and what a packed graph calls to tell them apart.

Legend: R rows, T tokens of all rows together, N heads, D head width, H hidden.

Source: the "unpadding" of MosaicBERT (arXiv:2312.17482) and variable-length attention of FlashAttention.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpray.runtime.cpu.fusions import capped_attention

_SCORES_IN_CACHE = 4_000_000  # elements: 8 MB
_BLOCK = 256
"""How many queries are computed together where a token sees a part of its row only."""


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of one batch lie among its T tokens.

    runs: (first token, rows, length of each) of neighbouring rows of one length. starts: int64 ``[R]``, each row's
    first token. positions: int64 ``[T]``, each token's place in its row. kept: int64 ``[T]``, where the tokens stood
    in the padded ``[B * S]``; None when nothing was padded. shape: B and S.
    """

    runs: tuple[tuple[int, int, int], ...]
    starts: Tensor
    positions: Tensor
    kept: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> PackedRows | None:
        """The rows of an attention mask int64 ``[B, S]``; None if padding comes before a token, or a row is empty."""
        array = mask.numpy()  # whose small operations cost a tenth of torch's
        count, width = array.shape
        places = np.arange(width)
        if array.all():
            if not width:
                return None
            starts = np.arange(count) * width
            positions = torch.from_numpy(np.tile(places, count))
            return cls(((0, count, width),), torch.from_numpy(starts), positions, None, (count, width))
        lengths = (array != 0).sum(axis=1)
        kept = places < lengths[:, None]
        if not lengths.all() or not np.array_equal(kept, array != 0):
            return None
        sizes: list[int] = lengths.tolist()
        runs, first = [], 0
        for length, group in itertools.groupby(sizes):
            rows = len(list(group))
            runs.append((first, rows, length))
            first += rows * length
        return cls(
            runs=tuple(runs),
            starts=torch.from_numpy(np.cumsum(lengths) - lengths),
            positions=torch.from_numpy(np.broadcast_to(places, kept.shape)[kept]),
            kept=torch.from_numpy(kept.ravel().nonzero()[0]),
            shape=(count, width),
        )

    def pack(self, tokens: Tensor) -> Tensor:
        """``[B, S]`` without its padding, ``[1, T]``."""
        flat = tokens.reshape(1, -1)
        return flat if self.kept is None else flat.index_select(1, self.kept)

    @cached_property
    def lengths(self) -> Tensor:
        """int64 ``[R]``, of each row."""
        return torch.tensor([length for _, count, length in self.runs for _ in range(count)])


def attend_rows(qkv: Tensor, width: int, rows: PackedRows, scale: float | None = None) -> Tensor:
    """Self-attention within each row, of queries, keys and values as one linear layer made them.

    ``[1, T, 3 N D]`` with heads of ``width`` D -> ``[1, T, N D]``.
    """
    parts = []
    for first, count, length in rows.runs:
        own = qkv if len(rows.runs) == 1 else qkv.narrow(1, first, count * length)
        heads = own.view(count, length, -1, width).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)
        out = _attend(q, k, v, scale)  # [count, N, length, D]
        parts.append(out.transpose(1, 2).reshape(1, count * length, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: PackedRows,
    scale: float | None = None,
    before: int | None = None,
    after: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Attention within each row: q, k, v and result ``[1, N, T, D]``.

    before, after: how many tokens before itself, and after, a token sees; None: all. cap: see `capped_attention`.
    """
    parts = []
    for first, count, length in rows.runs:
        own_q, own_k, own_v = (
            x[0].narrow(1, first, count * length).unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v)
        )
        out = _attend_within(own_q, own_k, own_v, scale, before, after, cap)  # [count, N, length, D]
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0).transpose(1, 2)


def _attend_within(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, before: int | None, after: int | None, cap: float | None
) -> Tensor:
    """Attention of a band, ``[C, N, L, D]``: block by block, so that memory grows with L and not with its square."""
    length = q.shape[2]
    before = length if before is None else before
    after = length if after is None else after
    if before >= length - 1 and after >= length - 1 and cap is None:
        return _attend(q, k, v, scale)
    if before >= length - 1 and after == 0 and cap is None and not (q.dtype is torch.bfloat16 and length >= 96):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    parts = []
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first, last = max(0, start - before), min(length, stop + after)
        queries = torch.arange(start, stop).unsqueeze(1)
        keys = torch.arange(first, last).unsqueeze(0)
        seen = (keys <= queries + after) & (keys >= queries - before)
        own = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        hides = None if bool(seen.all()) else seen
        if cap is None:
            parts.append(_attend(*own, scale, hides))
        else:
            parts.append(capped_attention(*own, hides, q.shape[-1] ** -0.5 if scale is None else scale, cap))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, seen: Tensor | None = None) -> Tensor:
    """Attention, ``[C, N, L, D]``; seen: bool ``[L, keys]``, what each query sees.

    torch's flash attention multiplies bfloat16 blocks slowly; from about 100 tokens on oneDNN's matrix products on
    either side of a softmax take half the time, as long as the scores fit the cache.
    """
    count, heads, length, width = q.shape
    scores_fit = count * heads * length * k.shape[2] <= _SCORES_IN_CACHE
    if q.dtype is torch.bfloat16 and k.shape[2] >= 96 and scores_fit:
        scores = torch.matmul(q * (scale or width**-0.5), k.transpose(2, 3))
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        return torch.matmul(scores.softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def row_cumsum(x: Tensor, rows: PackedRows) -> Tensor:
    """The running sum ``[1, T]`` of x within each row."""
    total = x.cumsum(1)
    before = (total - x).index_select(1, rows.starts)  # what the rows before had summed up to
    return total - before.repeat_interleave(rows.lengths, dim=1)


def row_positions(table: Tensor, rows: PackedRows) -> Tensor:
    """``table[:, :S]`` for every row: ``[1, P]`` -> ``[1, T]``."""
    return table.index_select(1, rows.positions)


def row_range(rows: PackedRows, dtype: torch.dtype) -> Tensor:
    """``arange(S)`` for every row: ``[T]``."""
    return rows.positions.to(dtype)


def row_starts(x: Tensor, rows: PackedRows) -> Tensor:
    """The first token of every row: ``[1, T, H]`` -> ``[R, H]``."""
    return x[0].index_select(0, rows.starts)


def row_argmax(x: Tensor, rows: PackedRows) -> Tensor:
    """Which of the T tokens has each row's largest value, the first of several: ``[1, T]`` -> int64 ``[R]``."""
    values, starts = x[0].numpy(), rows.starts.numpy()
    largest = np.maximum.reduceat(values, starts)
    found = np.flatnonzero(values == np.repeat(largest, rows.lengths.numpy()))
    return torch.from_numpy(found[np.searchsorted(found, starts)])


def row_sum(x: Tensor, rows: PackedRows, keepdim: bool = False) -> Tensor:
    """The sum of each row's tokens: ``[1, T, H]`` -> ``[R, H]``, or ``[R, 1, H]``; H may be missing."""
    parts = [
        x[0].narrow(0, first, count * length).unflatten(0, (count, length)).sum(1, keepdim)
        for first, count, length in rows.runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_padded(x: Tensor, rows: PackedRows) -> Tensor:
    """Every row's tokens, with zeros behind them: ``[1, T, L]`` -> ``[B, S, L]``."""
    if rows.kept is None:
        return x.reshape(*rows.shape, -1)
    count, width = rows.shape
    padded = x.new_zeros(count * width, x.shape[2]).index_copy_(0, rows.kept, x[0])
    return padded.view(count, width, -1)


def row_choice(x: Tensor, tokens: Tensor) -> Tensor:
    """These of the T tokens: ``[1, T, H]`` -> ``[R, H]``."""
    return x[0].index_select(0, tokens)
