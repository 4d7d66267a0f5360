"""An artifact on disk: one traced program per rank, what is needed to serve it, and a manifest that vouches for all.

::

    manifest.json          see `manifest.Manifest`
    model/                 config.json and the tokenizer's files
    rank_00/graph_0.json     the traced graph        \\  one folder per rank,
    rank_00/weights.safetensors   its tensors      /   written by that rank

The manifest is written last and the folder is renamed into place whole, so a reader never sees half of one.
Hashes tell damage and later changes; they are not a signature: load artifacts from where you trust the writer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpray.artifacts.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    RankRecord,
    UserModelManifest,
    read_manifest,
)
from tpray.errors import ArtifactError
from tpray.parallel_layers.files import file_digest

MODEL_DIR = "model"


def rank_folder(rank: int) -> str:
    """What the folder of rank ``rank``'s program is called."""
    return f"rank_{rank:02d}"


class _Folder:
    """An artifact's folder: the files of its ranks, compared with the manifest's records."""

    def __init__(self, directory: Path, ranks: Sequence[RankRecord]) -> None:
        self.directory, self._ranks = directory, ranks

    def rank_directory(self, rank: int) -> Path:
        """Where rank ``rank``'s program is."""
        return self.directory / rank_folder(rank)

    def check_rank(self, rank: int) -> None:
        """Compare the files of one rank with the manifest.

        Raises:
            ArtifactError: one is missing or altered; it is named.
        """
        self._check_files(rank_folder(rank), self._ranks[rank].files)

    def check_sizes(self) -> None:
        """See whether all files of the ranks are there, and whole; their contents are each rank's to check.

        Raises:
            ArtifactError: one is missing or of another size; it is named.
        """
        for rank, record in enumerate(self._ranks):
            for name, file in record.files.items():
                path = self.rank_directory(rank) / name
                if not path.is_file() or path.stat().st_size != file.size_bytes:
                    what = "damaged or was changed after tracing" if path.is_file() else "missing"
                    raise ArtifactError(f"{path} is {what}: trace it again")

    def _check_files(self, folder: str, files: dict[str, FileRecord]) -> None:
        for name, record in files.items():
            path = self.directory / folder / name
            if not path.resolve().is_relative_to((self.directory / folder).resolve()) or not path.is_file():
                raise ArtifactError(f"{path} is missing")
            if path.stat().st_size != record.size_bytes or file_digest(path) != record.sha256:
                raise ArtifactError(f"{path} is damaged or was changed after tracing: trace it again")


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
        artifact = cls(directory, read_manifest(directory, Manifest))
        artifact._check_files(MODEL_DIR, artifact.manifest.model_files)
        return artifact

    @property
    def model_directory(self) -> Path:
        """Where the configuration and the tokenizer are."""
        return self.directory / MODEL_DIR


class UserModelArtifact(_Folder):
    """A user's own traced model that is complete on disk."""

    def __init__(self, directory: Path, manifest: UserModelManifest) -> None:
        super().__init__(directory, manifest.ranks)
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path) -> UserModelArtifact:
        """Read the manifest and check it and the versions; not the ranks' files.

        Raises:
            ArtifactError: something is missing, altered or of another version; the file is named.
        """
        return cls(directory, read_manifest(directory, UserModelManifest))


def is_artifact(directory: Path) -> bool:
    """Whether ``directory`` looks like an artifact rather than a checkpoint."""
    return (directory / MANIFEST_FILE).is_file()


def record_files(directory: Path) -> dict[str, FileRecord]:
    """The records of every file below ``directory``, by its path there."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): FileRecord.of(path) for path in found}


def copy_model_files(files: Mapping[str, Path], directory: Path) -> dict[str, FileRecord]:
    """Copy configuration and tokenizer into ``directory`` (created), by their names, and return their records."""
    directory.mkdir(parents=True)
    for name, path in files.items():
        shutil.copyfile(path, directory / name)
    return record_files(directory)
