"""What crosses between a group and its ranks, besides steps: jobs to trace, and what ranks say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpray.artifacts.manifest import RankRecord
from tpray.errors import ArtifactError
from tpray.runtime.buckets import Bucket
from tpray.runtime.records import ProgramRecord
from tpray.runtime.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor

    from tpray.parallel_layers.checkpoint import Checkpoint

MakeModel = Callable[[], Any]
"""Returns a model, or a model and its io_aliases; called on every rank, with `parallel_state` set."""


class Loaded(NamedTuple):
    """What a loaded program can do; see `tpray.runtime.base.Program`."""

    packs_rows: bool = False
    parts: int = 1

    @classmethod
    def of_all(cls, ranks: Iterable[Loaded]) -> Loaded:
        """What each rank of a group can; they run one program.

        Raises:
            ArtifactError: they cannot do the same, so that they would not meet at their collectives.
        """
        kinds = set(ranks)
        if len(kinds) > 1:
            raise ArtifactError(
                "the ranks of this artifact hold programs of different kinds "
                f"({', '.join(map(str, sorted(kinds)))}): trace it again"
            )
        return kinds.pop()


@dataclass(frozen=True)
class WorkerInfo:
    """A rank as it is now. cores: those it has to itself, () when unpinned. peak_bytes: its largest resident size."""

    rank: int
    pid: int
    cores: tuple[int, ...]
    threads: int
    peak_bytes: int


@dataclass(frozen=True)
class ShardJob:
    """One rank's part of a trace. directory: its own, which it empties first. buckets: shapes; none: any.

    typed: whether the tokenizer gives token types.
    """

    checkpoint: Checkpoint
    dtype: str
    max_length: int
    buckets: tuple[Bucket, ...]
    directory: Path
    typed: bool


@dataclass(frozen=True)
class UserModelJob:
    """One rank's part of a trace of a user's own model. folder: where ``make`` runs. directory: the rank's own.

    inputs: what holds the tensors of each of the examples. compiler_args: what the user adds to the compiler's command
    line.
    """

    make: MakeModel
    examples: tuple[tuple[Tensor, ...], ...]
    inputs: Structure
    folder: str
    directory: Path
    compiler_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class UserModelTrace:
    """What a rank traced of a user's own model.

    outputs: what holds the outputs of each of the programs. aliases: names of its state -> the output that is their
    next value.
    """

    record: RankRecord
    programs: tuple[ProgramRecord, ...]
    outputs: tuple[Structure, ...]
    aliases: dict[str, int]
