"""Find a checkpoint, and read from it only what one rank needs.

A source is a Hub id or a local directory in transformers' layout: ``config.json``, the tokenizer's files,
and ``model.safetensors`` or ``pytorch_model.bin``, whole or with an index of parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tpray.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tpray.parallel_layers.files import TEXT_FILES, file_digest
from tpray.parallel_layers.layers import mark_sharded, partition_of
from tpray.parallel_layers.plan import Plan, plan_for

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A classifier's files on this machine.

    source: what the user named. directory: where the files are. revision: the Hub's commit, if any. own_plan: how to
    shard it, if the user says so.
    """

    source: str
    directory: Path
    revision: str | None = None
    own_plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """How it is sharded: the user's plan, or the table's.

        Raises:
            UnsupportedModelError: the table has none for its architecture.
        """
        return self.own_plan or plan_for(self.config.model_type)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the model.

        Raises:
            CheckpointError: ``config.json`` is not a transformers configuration.
            UnsupportedModelError: transformers does not know the architecture.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.directory, local_files_only=True)
        except (OSError, TypeError, AttributeError, json.JSONDecodeError) as e:
            raise CheckpointError(f"{self.directory}/config.json is not a transformers configuration: {e}") from e
        except (KeyError, ValueError) as e:
            named = json.loads((self.directory / "config.json").read_text()).get("model_type")
            raise UnsupportedModelError(
                f"{self.source}: the installed transformers does not know the architecture {named!r}"
            ) from e

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        """Where each tensor is: its name in the model -> the file that holds it."""
        files = self._files()
        index = next((f for f in files if f.name.endswith(".index.json")), None)
        try:
            if index is not None:
                files_of = json.loads(index.read_text())["weight_map"]
                found = {name: self.directory / file for name, file in files_of.items()}
            else:
                found = dict.fromkeys(_open(files[0]).names(), files[0])
        except (OSError, KeyError, ValueError, RuntimeError) as e:
            raise CheckpointError(f"{index or files[0]} cannot be read as weights: {e}") from e
        missing = sorted({str(path) for path in found.values() if not path.is_file()})
        if missing:
            raise CheckpointError(f"{self.source}: the index names files that are missing: {', '.join(missing)}")
        return found

    @property
    def size_bytes(self) -> int:
        """How large the weights are on disk."""
        return sum(path.stat().st_size for path in set(self.weight_files.values()))

    def _files(self) -> list[Path]:
        for name in WEIGHT_NAMES:
            for candidate in (self.directory / name, self.directory / f"{name}.index.json"):
                if candidate.is_file():
                    return [candidate]
        raise CheckpointError(f"{self.directory} has no weights: neither {' nor '.join(WEIGHT_NAMES)}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the configuration, the tokenizer's files and the weights: what the model *is*."""
        parts = [self.directory / "config.json", *self._files(), *self.weight_files.values()]
        parts += [path for pattern in TEXT_FILES for path in self.directory.glob(pattern)]
        total = hashlib.sha256()
        for path in sorted(set(parts)):
            total.update(f"{path.name}:{file_digest(path)}\n".encode())
        return total.hexdigest()

    def check_classifier(self) -> None:
        """Raise `UnsupportedModelError` unless transformers has a sequence classifier of this type."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

        if type(self.config) not in CLASSIFIERS:
            raise UnsupportedModelError(
                f"{self.source}: transformers has no sequence classifier of the type {self.config.model_type!r}"
            )
        if self.plan.reads_last_token and self.config.pad_token_id is None:
            raise CheckpointError(
                f"{self.source}: config.json names no pad_token_id, without which a {self.config.model_type} "
                "classifier cannot find the last token of a row: add the tokenizer's"
            )


def find_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Find the checkpoint that ``source`` names; a Hub id is downloaded unless it is cached already.

    Raises:
        ModelNotFoundError: there is no such directory or Hub id, or no network to fetch it.
        CheckpointError: the directory is not a checkpoint.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory} is not a checkpoint: it has no config.json")
        return Checkpoint(str(source), directory.resolve())
    if directory.exists():
        raise CheckpointError(f"{directory} is a file; name the directory that holds the checkpoint")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) and not str(source).startswith("."):
        return _from_hub(str(source), revision)
    raise ModelNotFoundError(f"there is no directory {source}, and it is not a Hub id (name or owner/name)")


def _from_hub(repo: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import errors, snapshot_download

    wanted = ["config.json", "*.json", *TEXT_FILES]
    try:
        # The weights in one format only: safetensors where the repository has them.
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted, "model*.safetensors"]))
        if not list(path.glob("model*.safetensors")):
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except errors.GatedRepoError as e:
        raise ModelNotFoundError(f"{repo} is gated: accept its terms on the Hub and run `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}") from e
    except errors.RepositoryNotFoundError as e:
        raise ModelNotFoundError(
            f"{repo} is neither a directory here nor a model on the Hub (a private one needs `hf auth login`)"
        ) from e
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        raise ModelNotFoundError(
            f"{repo} is not a directory here, is not in the local Hub cache, and the Hub cannot be reached: check "
            "the network, or name a local directory"
        ) from e
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{repo} on the Hub has no config.json: it is not a transformers checkpoint")
    return Checkpoint(repo, path, revision=path.name)


def load_shard(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Fill ``module``, built on the meta device with parallel layers, with this rank's part of each tensor.

    Sharded parameters are cut while they are read: of a safetensors file only the rank's own bytes.

    Raises:
        CheckpointError: tensors are missing or have other shapes than the model's; the first are named.
    """
    slices = _slices(module, checkpoint)
    parameters, buffers = dict(module.named_parameters()), _persistent_buffers(module)
    missing = [name for name in parameters if name not in slices]
    if missing:
        unused = [stored for stored in checkpoint.weight_files if stored not in {p.stored for p in slices.values()}]
        raise CheckpointError(
            f"{checkpoint.source} lacks {len(missing)} tensors of a {type(module).__name__}, among them "
            f"{', '.join(missing[:4])}; it has {', '.join(unused[:4]) or 'nothing'} besides"
            + ("; was it saved without a classification head?" if any("classif" in m for m in missing) else "")
        )
    readers: dict[Path, _Reader] = {}
    for name, target in (parameters | buffers).items():
        own = slices.get(name)
        if own is None:
            continue  # a buffer that the model makes itself
        if own.path not in readers:
            readers[own.path] = _open(own.path)
        value = _read(readers[own.path], own, name, target)
        _assign(module, name, value.to(dtype) if value.is_floating_point() else value)


@dataclass(frozen=True)
class _Slice:
    """Where a tensor is stored: file, name there, and which of how many equal parts along its first dimension."""

    path: Path
    stored: str
    part: int = 0
    parts: int = 1


def _slices(module: Any, checkpoint: Checkpoint) -> dict[str, _Slice]:
    """Where each tensor of the model is stored, by the model's names.

    Checkpoints of some architectures have older names, or several tensors in one; transformers knows which.
    Source: transformers/conversion_mapping.py.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(module)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    tensors = module.state_dict(keep_vars=True)
    found: dict[str, _Slice] = {}
    for stored, path in checkpoint.weight_files.items():
        name, source = rename_source_key(stored, renamings, converters, module.base_model_prefix, tensors)
        if source is None:
            found[name] = _Slice(path, stored)
            continue
        converter = next(c for c in converters if source in c.source_patterns)
        operation = converter.operations[0]
        if len(converter.operations) > 1 or not isinstance(operation, Chunk) or operation.dim != 0:
            raise CheckpointError(f"{checkpoint.source} stores {stored} in a form that tpray cannot cut while it reads")
        first, *_ = converter.target_patterns
        for part, target in enumerate(converter.target_patterns):
            found[name.replace(first, target)] = _Slice(path, stored, part, len(converter.target_patterns))
    return found


def _read(reader: _Reader, own: _Slice, name: str, target: Tensor) -> Tensor:
    part = partition_of(target)
    full = list(target.shape)
    if part is not None:
        full[part.dim] = part.full
        full = full[::-1] if part.transposed else full
    stored = reader.shape(own.stored)
    expected = [full[0] * own.parts, *full[1:]] if full else full
    if stored != expected:
        raise CheckpointError(
            f"the tensor {name} has the shape {stored} in {reader.path.name} and {expected} in the model that "
            "config.json describes"
        )
    start = own.part * full[0] if full else 0
    if part is None:
        whole = own.parts == 1
        return reader.whole(own.stored) if whole else reader.piece(own.stored, 0, start, start + full[0])
    dim = 1 - part.dim if part.transposed else part.dim
    offset = start if dim == 0 else 0  # what is stored in parts is cut by its rows
    pieces = [reader.piece(own.stored, dim, offset + first, offset + last) for first, last in part.bounds]
    return part.join([piece.t() for piece in pieces] if part.transposed else pieces).contiguous()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    parent_path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_path)
    if leaf in parent._buffers:
        parent._buffers[leaf] = value
        return
    old = parent._parameters[leaf]
    parameter = nn.Parameter(value, requires_grad=False)
    part = None if old is None else partition_of(old)
    if part is not None:
        mark_sharded(parameter, part)
    parent._parameters[leaf] = parameter


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


class _Reader(Protocol):
    """One weights file: shapes without reading, whole tensors, and pieces of them."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> list[int]: ...

    def whole(self, name: str) -> Tensor: ...

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {e}") from e

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> list[int]:
        return list(self._file.get_slice(name).get_shape())

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        tensor: Tensor = self._file.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        return tensor


class _Pickled:
    """A ``.bin`` file: memory-mapped, and unpickled with ``weights_only`` so that it cannot run code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        except Exception as e:  # torch.load raises many types for a damaged file
            raise CheckpointError(f"{path} is damaged or holds more than tensors: {e}") from e

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def whole(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self._tensors[name].narrow(dim, start, stop - start).clone()


def _open(path: Path) -> _Reader:
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)
