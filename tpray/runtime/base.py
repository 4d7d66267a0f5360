"""The protocol every runtime implements, and the choice of one.

Legend: B batch, S sequence, L labels. A program's inputs are ``input_ids``, ``attention_mask`` and
``token_type_ids``, int64 ``[B, S]``; its output is logits float32 ``[B, L]``, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tpray.config import DtypeName, RuntimeName
from tpray.runtime.artifact import Artifact, FunctionArtifact, ProgramRecord
from tpray.runtime.buckets import Bucket
from tpray.runtime.neuron_env import NeuronPlace, detect

Tell = Callable[[str], object]
"""Is told what has just been done, in a few words."""


def silent(text: str) -> None:
    """A `Tell` that tells nobody."""


class Program(Protocol):
    """A loaded program: takes the inputs, runs every collective inside, returns the outputs."""

    packs_rows: bool  # whether it leaves padding out, so that rows of any lengths go well together

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]: ...


INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
"""What a program is traced in. int8 is bfloat16 until it is loaded: weights are quantised there."""


class Runtime(Protocol):
    """One kind of core. Calls are made in the process of the rank, within `parallel_state.use`."""

    name: RuntimeName
    attention: str  # transformers' implementation of it that is traced: sdpa or eager
    compiles_alone: bool  # whether a rank can trace while the others do not

    def choose_dtype(self, asked: DtypeName) -> str:
        """The dtype to trace in.

        Raises:
            tpray.errors.ConfigError: the cores cannot compute in ``asked``; the message names what they can.
        """
        ...

    def default_buckets(self, max_length: int) -> tuple[Bucket, ...]:
        """The shapes to trace for when nobody says which; none where a program takes any."""
        ...

    def join(self, rank: int, size: int) -> None:
        """Enter what the runtime's own collectives need, before any use of the device; all ranks do it at once."""
        ...

    def trace(
        self, shard: nn.Module, max_length: int, directory: Path, buckets: Sequence[Bucket] = (), tell: Tell = silent
    ) -> None:
        """Trace this rank's shard and save it in ``directory``.

        One program for any B and any S up to ``max_length``, or one for each of ``buckets``; where each takes minutes
        to compile, ``tell`` hears of each.

        Raises:
            CompileError: the compiler failed.
        """
        ...

    def load(self, artifact: Artifact, rank: int) -> Program:
        """Load what `trace` saved for ``rank``, and make it ready to run fast.

        Raises:
            ArtifactError: the files do not hold a program of this runtime.
        """
        ...

    def trace_function(
        self, module: nn.Module, examples: Sequence[tuple[Tensor, ...]], directory: Path
    ) -> list[ProgramRecord]:
        """Trace a model of the user's own, once for each of ``examples``, and save the programs in ``directory``."""
        ...

    def load_function(self, artifact: FunctionArtifact, rank: int) -> Program:
        """Load what `trace_function` saved for ``rank``.

        Raises:
            ArtifactError: the files do not hold programs of this runtime.
        """
        ...

    def warm_up_shapes(self, max_length: int) -> Sequence[tuple[int, int]]:
        """Which [B, S] to run once before the first request, so that no request pays for a first time."""
        ...


def runtime_for(name: RuntimeName, place: NeuronPlace | None = None) -> Runtime:
    """The runtime called ``name``; ``auto`` is what this machine has. place: of the rank's cores, on NeuronCores."""
    from tpray.runtime.cpu import CpuRuntime
    from tpray.runtime.neuron import NeuronRuntime
    from tpray.runtime.neuron_xla import NeuronXlaRuntime

    chosen = detect() if name == "auto" else name
    if chosen == "cpu":
        return CpuRuntime()
    return (NeuronRuntime if chosen == "neuron" else NeuronXlaRuntime)(place or NeuronPlace())
