"""An artifact: one traced program per rank, what is needed to serve it, and a manifest that vouches for all.

::

    manifest.json          see `Manifest`
    model/                 config.json and the tokenizer's files
    rank_00/program_0.json   the traced graph        \\  one folder per rank,
    rank_00/weights.safetensors   its tensors      /   written by that rank

The manifest is written last and the folder is renamed into place whole, so a reader never sees half of one.
Hashes tell damage and later changes; they are no signature: load artifacts from where you trust the writer.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tpray.config import InstanceFamily, RuntimeName
from tpray.errors import ArtifactError
from tpray.parallel_layers.checkpoint import TEXT_FILES, Checkpoint, file_digest
from tpray.parallel_layers.plan import Plan
from tpray.runtime import neuron_env
from tpray.runtime.buckets import Bucket

FORMAT = 1
MANIFEST_FILE = "manifest.json"
MODEL_DIR = "model"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileRecord(_Frozen):
    """What a file must be. ``sha256`` in hexadecimal."""

    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of a file as it is now."""
        return cls(sha256=file_digest(path), size_bytes=path.stat().st_size)


class ModelRecord(_Frozen):
    """Which model this is, and what its logits mean."""

    source: str
    revision: str | None
    digest: str
    model_type: str
    max_length: int
    labels: tuple[str, ...]
    problem_type: str | None
    pad_id: int
    plan: dict[str, Any]

    @property
    def sharding(self) -> Plan:
        """How its layers are split."""
        return Plan.from_json(self.plan)


class RankRecord(_Frozen):
    """One rank's program: its files, and the bytes of its tensors that are sharded and replicated."""

    files: dict[str, FileRecord]
    sharded_bytes: int
    replicated_bytes: int


class Canary(_Frozen):
    """Inputs int64 ``[B, S]`` and the logits ``[B, L]`` that the unsharded float32 model gives for them."""

    input_ids: tuple[tuple[int, ...], ...]
    attention_mask: tuple[tuple[int, ...], ...]
    token_type_ids: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]


class TensorRecord(_Frozen):
    """A tensor that goes into a program or comes out of it; dtype by torch's name for it (float32, say)."""

    dtype: str
    shape: tuple[int, ...]


class ProgramRecord(_Frozen):
    """One program of a function: it takes inputs of these shapes and no others."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


class _Manifest(_Frozen):
    """What every artifact says of itself.

    versions: of the packages that shape a program. instance_family, lnc: of the NeuronCores it was compiled for.
    """

    format: int = FORMAT
    created: str
    versions: dict[str, str]
    machine: str
    runtime: RuntimeName
    instance_family: InstanceFamily | None = None
    lnc: int | None = None
    tp: int
    ranks: tuple[RankRecord, ...]

    def digest(self) -> str:
        """SHA-256 of this manifest's own content."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Manifest(_Manifest):
    """What vouches for a traced classifier.

    buckets: the shapes that it takes; none: any. shapes: of the program's inputs and output.
    """

    model: ModelRecord
    dtype: str
    buckets: tuple[Bucket, ...]
    shapes: dict[str, tuple[str, ...]]
    model_files: dict[str, FileRecord]
    canary: Canary


class FunctionManifest(_Manifest):
    """What vouches for a traced model of the user's own.

    aliases: names of the state tensors -> which output of the program becomes their next value.
    """

    programs: tuple[ProgramRecord, ...]
    aliases: dict[str, int]


M = TypeVar("M", bound=_Manifest)


class _Folder:
    """An artifact's folder: the files of its ranks, compared with the manifest's records."""

    def __init__(self, directory: Path, ranks: Sequence[RankRecord]) -> None:
        self.directory, self._ranks = directory, ranks

    def rank_directory(self, rank: int) -> Path:
        """Where rank ``rank``'s program is."""
        return self.directory / f"rank_{rank:02d}"

    def check_rank(self, rank: int) -> None:
        """Compare the files of one rank with the manifest.

        Raises:
            ArtifactError: one is missing or altered; it is named.
        """
        self._check_files(f"rank_{rank:02d}", self._ranks[rank].files)

    def _check_files(self, folder: str, files: dict[str, FileRecord]) -> None:
        for name, record in files.items():
            path = self.directory / folder / name
            if not path.resolve().is_relative_to((self.directory / folder).resolve()) or not path.is_file():
                raise ArtifactError(f"{path} is missing")
            if path.stat().st_size != record.size_bytes or file_digest(path) != record.sha256:
                raise ArtifactError(f"{path} is damaged or was changed after tracing")


class Artifact(_Folder):
    """A traced classifier that is complete on disk."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory, manifest.ranks)
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path) -> Artifact:
        """Read the manifest and check it, the versions and the files in ``model/``; not the ranks' files.

        Raises:
            ArtifactError: something is missing, altered or of another version; the file is named.
        """
        artifact = cls(directory, _read_manifest(directory, Manifest))
        artifact._check_files(MODEL_DIR, artifact.manifest.model_files)
        return artifact

    @property
    def model_directory(self) -> Path:
        """Where the configuration and the tokenizer are."""
        return self.directory / MODEL_DIR


class FunctionArtifact(_Folder):
    """A traced model of the user's own that is complete on disk."""

    def __init__(self, directory: Path, manifest: FunctionManifest) -> None:
        super().__init__(directory, manifest.ranks)
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path) -> FunctionArtifact:
        """Read the manifest and check it and the versions; not the ranks' files.

        Raises:
            ArtifactError: something is missing, altered or of another version; the file is named.
        """
        return cls(directory, _read_manifest(directory, FunctionManifest))


def _read_manifest(directory: Path, kind: type[M]) -> M:
    path = directory / MANIFEST_FILE
    try:
        stored = json.loads(path.read_bytes())
        own_digest = stored.pop("digest")
        manifest = kind.model_validate(stored)
    except (OSError, KeyError, TypeError, ValueError, ValidationError, AttributeError) as e:
        raise ArtifactError(f"{path} is no manifest of a traced model: {_first_line(e)}") from e
    if manifest.digest() != own_digest:
        raise ArtifactError(f"{path} was changed after it was written")
    for name, installed in versions(manifest.runtime).items():
        if manifest.versions.get(name) != installed:
            raise ArtifactError(
                f"{directory} was traced with {name} {manifest.versions.get(name)} and this is {name} "
                f"{installed}: trace it again"
            )
    return manifest


def is_artifact(directory: Path) -> bool:
    """Whether ``directory`` looks like an artifact rather than a checkpoint."""
    return (directory / MANIFEST_FILE).is_file()


def record_files(directory: Path) -> dict[str, FileRecord]:
    """The records of every file below ``directory``, by its path there."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): FileRecord.of(path) for path in found}


def copy_model_files(checkpoint: Checkpoint, directory: Path) -> dict[str, FileRecord]:
    """Copy configuration and tokenizer into ``directory`` (created) and return their records."""
    directory.mkdir(parents=True)
    wanted = {checkpoint.directory / "config.json"}
    wanted |= {path for pattern in TEXT_FILES for path in checkpoint.directory.glob(pattern) if path.is_file()}
    for path in sorted(wanted):
        shutil.copyfile(path, directory / path.name)
    return record_files(directory)


def write_manifest(directory: Path, manifest: _Manifest) -> None:
    """Write the manifest and its own digest; the last file of an artifact."""
    stored = {"digest": manifest.digest(), **manifest.model_dump(mode="json")}
    (directory / MANIFEST_FILE).write_text(json.dumps(stored, indent=1) + "\n")


def cache_key(
    checkpoint: Checkpoint,
    tp: int,
    dtype: str,
    runtime: RuntimeName,
    buckets: Sequence[Bucket],
    cores: str = "",
) -> str:
    """The content address of an artifact: the same key means the same programs. cores: the kind compiled for."""
    plan = json.dumps(checkpoint.plan.to_json(), sort_keys=True)
    shapes = ",".join(map(str, buckets))
    own = [str(FORMAT), checkpoint.digest, plan, str(tp), dtype, runtime, shapes, cores]
    parts = [*own, _code_digest(), *versions(runtime).values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@cache
def versions(runtime: RuntimeName = "cpu") -> dict[str, str]:
    """Versions of the packages that shape a program of ``runtime``, those that are installed here."""
    found = {}
    for name in ("tpray", "torch", "transformers", *neuron_env.PACKAGES.get(runtime, ())):
        with suppress(PackageNotFoundError):  # a machine without accelerators may still look at an artifact
            found[name] = version(name)
    return found


def now() -> str:
    """The time of day in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine() -> str:
    """What the artifact was made on, for a person to read."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


@cache
def _code_digest() -> str:
    """Of the code that shapes a program, so that a changed plan or layer never meets an old artifact."""
    root = Path(__file__).parent.parent
    files = sorted([*(root / "parallel_layers").glob("*.py"), *(root / "runtime").glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
