"""Weights in pages of 2 MB: a step reads all of them once, and with pages of 4 KB the cores wait for the page tables.

Source: madvise(2), MADV_HUGEPAGE and, since Linux 6.1, MADV_COLLAPSE, which does it at once for what is there already.
Where the system does not allow huge pages, or has none to give, everything stays as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
_HUGE_PAGE, _COLLAPSE = 14, 25
_ADJACENT = 64 << 10  # what an allocator keeps between two blocks is less


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Put the memory of packed ``tensors`` in huge pages; how many bytes this was tried for."""
    ranges = sorted((torch.ops.mkldnn.data_ptr(x), torch.ops.mkldnn._nbytes(x)) for x in tensors if x.is_mkldnn)
    merged: list[list[int]] = []  # [begin, end], together where they are neighbours
    for begin, size in ranges:
        if merged and begin - merged[-1][1] < _ADJACENT:
            merged[-1][1] = max(merged[-1][1], begin + size)
        else:
            merged.append([begin, begin + size])
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    total = 0
    for begin, end in merged:
        first, last = -(-begin // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
        if first < last and advise(first, last - first, _HUGE_PAGE) == 0:
            advise(first, last - first, _COLLAPSE)
            total += last - first
    return total
