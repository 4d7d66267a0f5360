"""A user's own model: how it becomes one of flat tensors, which of these are state, and how its errors are shown.

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

from tpray.errors import ConfigError, TraceError
from tpray.runtime.records import TensorRecord
from tpray.runtime.structure import Structure, take_apart


def record_of(tensor: Tensor) -> TensorRecord:
    """A tensor's dtype and shape."""
    return TensorRecord(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor for the wire. numpy has no bfloat16: it travels as float32, which holds every value of it."""
    wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    array: npt.NDArray[Any] = wide.detach().cpu().numpy()
    return array


class FlatModel(nn.Module):
    """``model`` with its inputs and outputs, whatever holds them, as flat tuples of tensors.

    Args:
        inputs: what holds the model's positional inputs.
        aliases: the user's io_aliases, from state tensors to numbers of outputs. `aliases` has the tensors' names. They
            are compared with the outputs while these are traced, which is before anything is compiled.

    Raises:
        ConfigError: a key of ``aliases`` is not a parameter or buffer of the model, or shares its memory with another
            one; from `forward`: an output cannot become its state's next value, or is no tensor.
    """

    def __init__(self, model: nn.Module, inputs: Structure, aliases: Mapping[Any, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self._inputs, self._outputs = inputs, _Outputs()
        self.aliases = {self._name_of(tensor): number for tensor, number in (aliases or {}).items()}
        self._states = {self._name_of(tensor): record_of(tensor) for tensor in aliases or ()}
        for name in self.aliases:  # the exporter shares among programs what belongs to the state_dict, and only that
            parent, _, leaf = name.rpartition(".")
            self.get_submodule(parent)._non_persistent_buffers_set.discard(leaf)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = self.model(*self._inputs.build(iter(inputs)))
        tensors, structure = take_apart(made, "what the model returns")
        self._check_aliases(tensors)
        self._outputs.by_shapes[tuple(map(record_of, inputs))] = structure
        return tuple(tensors)

    def outputs(self, inputs: Sequence[TensorRecord]) -> Structure:
        """What held the outputs when the model was traced with such inputs."""
        return self._outputs.by_shapes[tuple(inputs)]

    def _name_of(self, state: Any) -> str:
        every = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        for name, tensor in every:
            if tensor is state:
                self._check_own_memory(name, tensor, every)
                return name
        raise ConfigError(
            "a key of io_aliases is not a parameter or buffer of the model: give the model its state with "
            "register_buffer, and use that very tensor as the key"
        )

    def _check_own_memory(self, name: str, state: Tensor, every: Sequence[tuple[str, Tensor]]) -> None:
        """A traced program keeps each tensor by itself: what shares a state's memory would not change with it."""
        place = state.untyped_storage().data_ptr()
        for other, tensor in every:
            if other != name and place and tensor.untyped_storage().data_ptr() == place:
                shown, shown_other = name.removeprefix("model."), other.removeprefix("model.")
                raise ConfigError(
                    f"io_aliases: the state {shown} shares its memory with {shown_other}, which would not change with "
                    "it: give the model one of them, or a clone"
                )

    def _check_aliases(self, outputs: Sequence[Tensor]) -> None:
        for name, number in self.aliases.items():
            shown, state = name.removeprefix("model."), self._states[name]
            if not 0 <= number < len(outputs):
                raise ConfigError(f"io_aliases: the state {shown} wants output {number} of {len(outputs)}")
            if record_of(outputs[number]) != state:
                raise ConfigError(
                    f"io_aliases: the state {shown} is {_described(state)} and output {number} is "
                    f"{_described(record_of(outputs[number]))}; they must be the same"
                )


class _Outputs:
    """A place to write down structures that is no attribute of the module's own: these must not change in a trace."""

    def __init__(self) -> None:
        self.by_shapes: dict[tuple[TensorRecord, ...], Structure] = {}


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
