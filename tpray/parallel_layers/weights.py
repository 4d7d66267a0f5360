"""Files of weights: what tensors they hold, and pieces of them, without reading the rest."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tpray.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Reader(Protocol):
    """One weights file: shapes without reading, whole tensors, and pieces of them."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> list[int]: ...

    def whole(self, name: str) -> Tensor: ...

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor: ...


class SafetensorsFile:
    """What is read comes through a mapping of its own, so that its pages go with it, and not with the file's reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path} is damaged or no safetensors file: {e}") from e

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> list[int]:
        from safetensors import SafetensorError

        try:
            return list(self._file.get_slice(name).get_shape())
        except SafetensorError as e:
            raise CheckpointError(f"{self.path} has no tensor {name}, which the index of the weights names: {e}") from e

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self._open().get_tensor(name)
        return tensor

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        tensor: Tensor = self._open().get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        return tensor


class PickledFile:
    """A ``.bin`` file: memory-mapped where it can be; unpickled with ``weights_only``, so that it runs no code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        import torch

        try:
            # Files of torch before 1.6 are no zip archives, and cannot be memory-mapped.
            mapped = zipfile.is_zipfile(path)
            self._tensors: dict[str, Tensor] = torch.load(path, mmap=mapped, weights_only=True, map_location="cpu")
        except Exception as e:  # torch.load raises many types for a damaged file
            raise CheckpointError(f"{path} is damaged or holds more than tensors: {e}") from e

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> list[int]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}, which the index of the weights names")
        return list(self._tensors[name].shape)

    def whole(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self._tensors[name].narrow(dim, start, stop - start).clone()


def open_weights(path: Path) -> Reader:
    """A file of weights, to read from.

    Raises:
        CheckpointError: it is damaged, or not weights.
    """
    _refuse_pointer(path)
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS and not weights: fetch them with `git lfs pull`")
