"""The protocol that every runtime implements, and the choice of one.

Legend: B batch, S sequence, L labels. A classifier's program takes ``input_ids``, ``attention_mask`` and
``token_type_ids``, int64 ``[B, S]``; its output is logits float32 ``[B, L]``, the same on every rank; of a
classifier of tokens ``[B, S, L]``, with zeros where padding is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from tpray.parallel_layers.plan import Plan
from tpray.platforms.topology import Topology
from tpray.runtime.buckets import Bucket
from tpray.runtime.records import ProgramRecord

Report = Callable[[str], object]
"""Is called with what has just been done, in a few words."""


def no_report(text: str) -> None:
    """A `Report` that goes nowhere."""


class Program(Protocol):
    """A loaded program: takes the inputs, runs every collective inside, returns the outputs."""

    packs_rows: bool  # whether it leaves padding out, so that rows of any lengths go well together
    parts: int  # how many pieces `in_parts` comes in; 1: it is not there

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]: ...

    def in_parts(self, *inputs: Tensor) -> Generator[None, None, Sequence[Tensor]]:
        """The same call with ``parts`` - 1 stops, behind the same collectives on every rank; other calls may be made
        meanwhile."""
        ...


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
"""What a program is traced in. int8 is bfloat16 until it is loaded: weights are quantised there."""


@dataclass(frozen=True)
class SavedShard:
    """What `Runtime.trace` has saved of one rank of a classifier, to be loaded.

    directory: the rank's own. buckets: the shapes that were traced; none: any. plan: how the layers were split.
    """

    directory: Path
    rank: int
    tp: int
    dtype: str
    buckets: tuple[Bucket, ...]
    plan: Plan


@dataclass(frozen=True)
class SavedUserModel:
    """What `Runtime.trace_user_model` has saved of one rank, to be loaded.

    aliases: names of the state tensors -> which output of the program becomes their next value.
    """

    directory: Path
    rank: int
    tp: int
    programs: tuple[ProgramRecord, ...]
    aliases: Mapping[str, int]


class Runtime(Protocol):
    """How one rank traces, loads and runs its shard. Calls are made in its process, within `parallel_state.use`.

    Args:
        topology: of the rank's group.
        first_core: the number of the rank's first core in a process that holds all ranks; None: a process of its own.
    """

    attention: str  # transformers' implementation of it that is traced: sdpa or eager

    def __init__(self, topology: Topology, first_core: int | None = None) -> None: ...

    def join(self, rank: int, size: int) -> None:
        """Enter what the runtime's own collectives need, before any use of the device; all ranks do it at once."""
        ...

    def trace(
        self,
        shard: nn.Module,
        max_length: int,
        directory: Path,
        buckets: Sequence[Bucket],
        report: Report = no_report,
        in_int8: Callable[[str], bool] | None = None,
    ) -> None:
        """Trace this rank's shard and save it in ``directory``.

        One program for any B and any S up to ``max_length``, or one for each of ``buckets``; where each takes minutes
        to compile, ``report`` is called after each. in_int8: which linear layers, by their paths, compute in int8.

        Raises:
            CompileError: the compiler failed.
        """
        ...

    def load(self, saved: SavedShard) -> Program:
        """Load a shard, and make it ready to run fast.

        Raises:
            ArtifactError: the files do not hold a program of this runtime.
        """
        ...

    def trace_user_model(
        self,
        module: nn.Module,
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        compiler_args: tuple[str, ...] = (),
        aliases: Mapping[str, int] | None = None,
    ) -> list[ProgramRecord]:
        """Trace a user's own model, once for each of ``examples``, and save the programs in ``directory``.

        Args:
            module: takes and returns flat tuples of tensors. Exporting it raises `ConfigError` where ``aliases`` do not
                fit its outputs, so that nothing is compiled then.
            compiler_args: what the user adds to the compiler's command line.
            aliases: names of state tensors -> the number of the output that becomes their next value. What is traced
                returns these outputs all the same; a compiler may keep them on the device.

        Raises:
            ConfigError: ``compiler_args`` mean nothing to the runtime's compiler, or the aliases do not fit.
            CompileError: the compiler failed.
        """
        ...

    def load_user_model(self, saved: SavedUserModel) -> Program:
        """Load what `trace_user_model` saved.

        Raises:
            ArtifactError: the files do not hold programs of this runtime.
        """
        ...


def runtime_for(topology: Topology, first_core: int | None = None) -> Runtime:
    """The runtime of a rank of this group; see `Runtime` for the arguments."""
    module, _, name = topology.platform.runtime_class.partition(":")
    return cast(Runtime, getattr(import_module(module), name)(topology, first_core))
