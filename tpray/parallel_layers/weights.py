"""Files of weights: what tensors they hold, and pieces of them, without reading the rest."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tpray.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def bytes_per_weight(path: Path) -> int | None:
    """How many bytes most weights of a safetensors file take, without torch; None if it does not say."""
    from safetensors import SafetensorError, safe_open

    counts: Counter[str] = Counter()
    try:
        with safe_open(path, framework="numpy") as file:
            for tensor in map(file.get_slice, file.keys()):
                counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    except (OSError, SafetensorError):  # another format, or damaged: whoever reads the weights says so
        return None
    return _WIDTHS.get(counts.most_common(1)[0][0]) if counts else None


class Reader(Protocol):
    """One weights file: shapes without reading, whole tensors, and pieces of them.

    All raise `CheckpointError` for a tensor that is not in the file.
    """

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
        with self._reading(name):
            return list(self._file.get_slice(name).get_shape())

    def whole(self, name: str) -> Tensor:
        with self._reading(name):
            tensor: Tensor = self._open().get_tensor(name)
            return tensor

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        with self._reading(name):
            tensor: Tensor = self._open().get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
            return tensor

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Translate what safetensors raises."""
        from safetensors import SafetensorError

        try:
            yield
        except SafetensorError as e:
            if name not in self.names():
                raise CheckpointError(_lacks(self.path, name)) from e
            raise CheckpointError(f"{self.path}: the tensor {name} cannot be read: {e}") from e


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
        return list(self._tensor(name).shape)

    def whole(self, name: str) -> Tensor:
        return self._tensor(name).clone()

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self._tensor(name).narrow(dim, start, stop - start).clone()

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(_lacks(self.path, name))
        return self._tensors[name]


def _lacks(path: Path, name: str) -> str:
    return f"{path} has no tensor {name}: it is damaged, or the index of the weights is that of other files"


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
