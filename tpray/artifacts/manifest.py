"""What vouches for an artifact: the records in its manifest, and the versions that it belongs to."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from tpray.config import Frozen, InstanceFamily
from tpray.errors import ArtifactError, ConfigError, InputError
from tpray.parallel_layers.files import file_digest, read_json
from tpray.parallel_layers.plan import Plan
from tpray.parallel_layers.tasks import TEXT
from tpray.platforms import PLATFORMS
from tpray.platforms.topology import Topology
from tpray.runtime.buckets import Bucket
from tpray.runtime.records import Canary, ProgramRecord
from tpray.runtime.structure import Structure

FORMAT = 2
MANIFEST_FILE = "manifest.json"


class FileRecord(Frozen):
    """What a file must be. ``sha256`` in hexadecimal."""

    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of a file as it is now."""
        return cls(sha256=file_digest(path), size_bytes=path.stat().st_size)


class ModelRecord(Frozen):
    """Which model this is, and what its logits mean.

    task: `tpray.parallel_layers.tasks`' name of it.
    pad_id: the id that the model takes for padding. vocab_size, token_types: how many ids and token types it knows.
    reads_padding: a row's logits depend on how much padding it has, so that it only goes with rows of its length.
    """

    source: str
    revision: str | None
    digest: str
    model_type: str
    task: str = TEXT
    max_length: int
    vocab_size: int
    token_types: int = 0
    labels: tuple[str, ...]
    problem_type: str | None
    pad_id: int
    reads_padding: bool = False
    plan: dict[str, Any]

    @property
    def sharding(self) -> Plan:
        """How its layers are split."""
        return Plan.from_json(self.plan)

    def check_inputs(self, inputs: Sequence[npt.NDArray[np.int64]]) -> None:
        """Refuse ids, mask and types ``[B, S]`` that the model cannot look up: they would fail a step on every rank.

        Raises:
            InputError: what is wrong, and which are known.
        """
        ids, _, types = inputs
        if ids.size == 0 or ids.shape[1] > self.max_length:
            raise InputError(
                f"logits are computed for rows of 1 to {self.max_length} tokens, and these are {ids.shape}"
            )
        for what, array, known in (("token ids", ids, self.vocab_size), ("token types", types, self.token_types)):
            if not 0 <= array.min() <= array.max() < max(1, known):
                raise InputError(
                    f"this model knows {what} from 0 to {max(1, known) - 1}, and these go from {array.min()} to "
                    f"{array.max()}"
                )


class RankRecord(Frozen):
    """One rank's program: its files, and the bytes of its tensors that are sharded and replicated."""

    files: dict[str, FileRecord]
    sharded_bytes: int
    replicated_bytes: int


class BaseManifest(Frozen):
    """What every artifact says of itself.

    versions: of the packages that shape a program. instance_family, lnc: of the NeuronCores it was compiled for.
    """

    format: int = FORMAT
    created: str
    versions: dict[str, str]
    machine: str
    runtime: str
    instance_family: InstanceFamily | None = None
    lnc: int | None = None
    tp: int
    ranks: tuple[RankRecord, ...]

    def digest(self) -> str:
        """SHA-256 of this manifest's own content."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Manifest(BaseManifest):
    """What vouches for a traced classifier.

    buckets: the shapes that it takes; none: any. shapes: of the program's inputs and output.
    """

    model: ModelRecord
    dtype: str
    buckets: tuple[Bucket, ...]
    shapes: dict[str, tuple[str, ...]]
    model_files: dict[str, FileRecord]
    canary: Canary

    @property
    def weight_bytes(self) -> int:
        """Of all ranks together."""
        return sum(rank.sharded_bytes + rank.replicated_bytes for rank in self.ranks)


class UserModelManifest(BaseManifest):
    """What vouches for a user's own traced model.

    inputs: what holds the inputs of every program. outputs: what holds those of each. aliases: names of the state
    tensors -> which output of the program becomes their next value.
    """

    programs: tuple[ProgramRecord, ...]
    inputs: Structure
    outputs: tuple[Structure, ...]
    aliases: dict[str, int]


def check_cores(manifest: BaseManifest, topology: Topology, name: str) -> None:
    """Refuse an artifact, called ``name``, that was compiled for other NeuronCores than those of ``topology``.

    Raises:
        ConfigError: it was.
    """
    family, lnc = topology.compiled_for
    for what, traced, asked in (
        ("instance family", manifest.instance_family, family),
        ("logical NeuronCore size", manifest.lnc, lnc),
    ):
        if None not in (traced, asked) and traced != asked:
            raise ConfigError(
                f"{name} was compiled for the {what} {traced}, and this is {asked}: trace the model again for it"
            )


M = TypeVar("M", bound=BaseManifest)


def read_manifest(directory: Path, kind: type[M]) -> M:
    """The manifest in ``directory``, which must be unchanged and of the versions that are installed.

    Raises:
        ArtifactError: it is missing, altered or of another version.
    """
    path = directory / MANIFEST_FILE
    try:
        stored = read_json(path)
        own_digest = stored.pop("digest")
        manifest = kind.model_validate(stored)
    except (OSError, KeyError, TypeError, ValueError, ValidationError, AttributeError) as e:
        raise ArtifactError(f"{path} is not a manifest of a traced model: {_first_line(e)}") from e
    if manifest.digest() != own_digest:
        raise ArtifactError(f"{path} was changed after it was written")
    for name, installed in versions(manifest.runtime).items():
        if manifest.versions.get(name) != installed:
            raise ArtifactError(
                f"{directory} was traced with {name} {manifest.versions.get(name)} and this is {name} "
                f"{installed}: trace it again"
            )
    return manifest


def write_manifest(directory: Path, manifest: BaseManifest) -> None:
    """Write the manifest and its own digest; the last file of an artifact."""
    stored = {"digest": manifest.digest(), **manifest.model_dump(mode="json")}
    (directory / MANIFEST_FILE).write_text(json.dumps(stored, indent=1) + "\n")


@cache
def versions(runtime: str = "cpu") -> dict[str, str]:
    """Versions of the packages that shape a program of ``runtime``, those that are installed here."""
    found = {}
    packages = PLATFORMS[runtime].packages if runtime in PLATFORMS else ()
    for name in ("tpray", "torch", "transformers", *packages):
        with suppress(PackageNotFoundError):  # a machine without accelerators may still look at an artifact
            found[name] = version(name)
    return found


def now() -> str:
    """The time of day in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """What the artifact was made on, for a person to read."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
