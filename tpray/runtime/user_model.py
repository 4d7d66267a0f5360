"""A user's own model: how it is flattened, which of its tensors are state, and how its errors are shown.

The semantics are neuronx-distributed's: ``io_aliases`` maps a state tensor (a parameter or buffer of the model) to the
number of the output that becomes its next value. Such an output stays on the rank; the others are returned.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpray.errors import ConfigError, TraceError
from tpray.runtime.records import TensorRecord


def record_of(tensor: Tensor) -> TensorRecord:
    """A tensor's dtype and shape."""
    return TensorRecord(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor for the wire. numpy has no bfloat16: it travels as float32, which holds every value of it."""
    wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    array: npt.NDArray[Any] = wide.detach().cpu().numpy()
    return array


class FlatModel(nn.Module):
    """``model`` with its outputs, whatever holds them, as one flat tuple of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = pytree.tree_leaves(self.model(*inputs))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def name_aliases(model: FlatModel, aliases: Mapping[Any, int], outputs: Sequence[TensorRecord]) -> dict[str, int]:
    """io_aliases with the state tensors' names in place of the tensors.

    Raises:
        ConfigError: a key is not a parameter or buffer of the model, or an output is not what can become its value.
    """
    named = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    found: dict[str, int] = {}
    for tensor, number in aliases.items():
        name = named.get(id(tensor))
        if name is None:
            raise ConfigError(
                "a key of io_aliases is not a parameter or buffer of the model: give the model its state with "
                "register_buffer, and use that very tensor as the key"
            )
        if not 0 <= number < len(outputs):
            raise ConfigError(f"io_aliases: the state {name[6:]} wants output {number} of {len(outputs)}")
        if outputs[number] != record_of(tensor):
            raise ConfigError(
                f"io_aliases: the state {name[6:]} is {_described(record_of(tensor))} and output {number} is "
                f"{_described(outputs[number])}; they must be the same"
            )
        found[name] = number
    return found


def _described(record: TensorRecord) -> str:
    return f"{record.dtype} {list(record.shape)}"


def explain(error: Exception, doing: str) -> TraceError:
    """An error in code of the user's as one that shows where: the last lines of the traceback that are not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    library = f"{os.sep}torch{os.sep}"
    own = [frame for frame in frames if library not in frame.filename and not frame.filename.startswith("<")]
    shown = "".join(traceback.format_list(own[-3:])).rstrip()
    said = str(error).strip().splitlines()
    return TraceError(f"{doing}: {type(error).__name__}: {said[0] if said else ''}\n{shown}")
