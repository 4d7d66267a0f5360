"""Programs of static shapes: one compiled module for each set of input shapes, chosen call by call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpray.runtime.buckets import Bucket
from tpray.runtime.records import ProgramRecord

Shapes = tuple[tuple[int, ...], ...]
Module = Callable[..., Any]
"""Returns a tensor, or a sequence of tensors."""


class ShapedProgram:
    """A rank's modules, by the shapes of their inputs; they share ``state``.

    Args:
        modules: what takes inputs of such shapes, and no others.
        dtypes: of the inputs, which are converted; None: they come as they must be.
        state: tensors that stay on the rank -> which output becomes their next value, and is not returned.
    """

    packs_rows = False
    parts = 1

    def __init__(
        self,
        modules: Mapping[Shapes, Module],
        dtypes: Sequence[torch.dtype] | None = None,
        state: Mapping[Tensor, int] | None = None,
    ) -> None:
        self._modules, self._dtypes, self._state = modules, dtypes, state or {}
        self._kept = set(self._state.values())

    @classmethod
    def of_buckets(cls, buckets: Sequence[Bucket], modules: Sequence[Module]) -> ShapedProgram:
        """A classifier's: ids, mask and types int64 ``[B, S]`` of a bucket's shape -> logits ``[B, L]``."""
        return cls({(tuple(bucket),) * 3: module for bucket, module in zip(buckets, modules, strict=True)})

    @classmethod
    def of_records(
        cls, records: Sequence[ProgramRecord], modules: Sequence[Module], state: Mapping[Tensor, int] | None = None
    ) -> ShapedProgram:
        """A user's own model's, traced for the inputs that ``records`` describe."""
        shapes = [tuple(record.shape for record in program.inputs) for program in records]
        dtypes = [getattr(torch, record.dtype) for record in records[0].inputs]
        return cls(dict(zip(shapes, modules, strict=True)), dtypes, state)

    def in_parts(self, *inputs: Tensor) -> Generator[None, None, Sequence[Tensor]]:
        raise NotImplementedError("a program of static shapes is run as a whole")

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        module = self._modules[tuple(tuple(x.shape) for x in inputs)]
        if self._dtypes is not None:
            inputs = tuple(x.to(dtype) for x, dtype in zip(inputs, self._dtypes, strict=True))
        made = module(*inputs)
        outputs: Sequence[Tensor] = (made,) if isinstance(made, Tensor) else made
        if self._state:  # what is returned, and what other states take, is what it was before they change
            places = {tensor.untyped_storage().data_ptr() for tensor in self._state}
            outputs = [o.clone() if o.untyped_storage().data_ptr() in places else o for o in outputs]
        for tensor, number in self._state.items():
            tensor.copy_(outputs[number])
        return [output for number, output in enumerate(outputs) if number not in self._kept]
