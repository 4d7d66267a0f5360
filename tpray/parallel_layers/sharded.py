"""Checkpoints of tensor-parallel training, in neuronx-distributed's layouts: one part per rank, or one whole file.

::

    bert.pt                                     whole: {"model": {name: tensor}}
    DIR/tp_rank_00_pp_rank_00/checkpoint.pt     sharded: the same from each rank, with its own parts
    DIR/tp_rank_00_pp_rank_00                   sharded, xser: the same without the tensors, which are in
    DIR/tp_rank_00_pp_rank_00.tensors/tensor_0.pt

A name may end in ``_dp_rank_00``, as it does when every data-parallel rank saved. Files are unpickled with
``weights_only``: they cannot run code.

Source: ``parallel_layers.load`` and ``save`` of neuronx-distributed; ``torch_xla.utils.serialization`` for xser.
"""

from __future__ import annotations

import collections
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpray.errors import CheckpointError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.partition import Partition, part_number, partition_of, shard_bounds

_PART = re.compile(r"tp_rank_(\d+)_pp_rank_(\d+)(_dp_rank_\d+)?")

TensorReference = collections.namedtuple("TensorReference", ["tid", "type"])
"""Stands for tensor ``tid`` in an xser file; torch_xla's class has the same name and fields."""
TensorReference.__module__ = "torch_xla.utils.serialization"


def load(
    path: str | Path,
    model: nn.Module | None = None,
    model_key: str | None = "model",
    load_xser: bool = False,
    sharded: bool = True,
    strict: bool = True,
    weights_only: bool = True,
) -> Any:
    """Read a checkpoint, and fill ``model`` with this rank's part of it.

    Args:
        path: a file if ``sharded`` is false, else the folder with the ranks' parts.
        model: filled in place; parallel layers take their slices. A sharded checkpoint of another degree is put
            together and cut anew.
        model_key: where the tensors are in what was saved; None: it holds nothing else.
        load_xser: taken for upstream's sake; which layout a part has shows.
        strict: whether missing and unexpected tensors are errors.
        weights_only: False is refused: it would let a file run code.

    Returns:
        What was saved: of a sharded checkpoint, this rank's part.

    Raises:
        CheckpointError: there is no checkpoint at ``path``, it is damaged, or its names or shapes are not the model's;
            the first few are named.
    """
    if not weights_only:
        raise CheckpointError("tpray reads checkpoints with weights_only=True, so that no file can run code")
    path = Path(path)
    if not sharded:
        saved = _read_file(path)
        if model is not None:
            _fill(model, _tensors(saved, model_key, path), path, strict, whole=True)
        return saved
    parts = find_parts(path)
    state = parallel_state.current()
    if len(parts) == state.size:
        saved = _read_part(parts[state.rank])
        if model is not None:
            _fill(model, _tensors(saved, model_key, path), path, strict, whole=False)
        return saved
    if model is None:
        raise CheckpointError(
            f"{path} was saved by {len(parts)} ranks and these are {state.size}: give the model, so that it can be cut "
            "anew"
        )
    saved_parts = [_tensors(_read_part(part), model_key, path) for part in parts]
    whole = {name: _join(name, [part[name] for part in saved_parts], model) for name in saved_parts[0]}
    _fill(model, whole, path, strict, whole=True)
    return {model_key: whole} if model_key else whole


def save(checkpoint: Mapping[str, Any], output_dir: str | Path, save_xser: bool = False) -> None:
    """Write this rank's part of a checkpoint, usually ``{"model": model.state_dict()}``, in the sharded layout."""
    name = f"tp_rank_{parallel_state.current().rank:02d}_pp_rank_00"
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if not save_xser:
        (directory / name).mkdir(exist_ok=True)
        torch.save(dict(checkpoint), directory / name / "checkpoint.pt")
        return
    tensors: list[Tensor] = []

    def refer(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value.detach().cpu())
            return TensorReference(len(tensors) - 1, str(value.type()))
        if isinstance(value, Mapping):
            return {key: refer(part) for key, part in value.items()}
        return type(value)(map(refer, value)) if isinstance(value, (list, tuple)) else value

    referring = refer(checkpoint)
    folder = directory / f"{name}.tensors"
    folder.mkdir(exist_ok=True)
    for number, tensor in enumerate(tensors):
        torch.save(tensor, folder / f"tensor_{number}.pt")
    with _importable():
        torch.save(referring, directory / name)


@contextmanager
def _importable() -> Iterator[None]:
    """pickle looks a class up in its module: where torch_xla is not installed, an empty one stands in."""
    names = ["torch_xla", "torch_xla.utils", "torch_xla.utils.serialization"]
    added = [name for name in names if name not in sys.modules and find_spec("torch_xla") is None]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
    if added:
        sys.modules[names[-1]].TensorReference = TensorReference  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def merge(source: str | Path, target: str | Path, model: nn.Module, model_key: str = "model") -> None:
    """Put a sharded checkpoint together into one file, which `load` reads with ``sharded=False``.

    Args:
        model: with parallel layers of any degree: it says which tensors are parts, and along which dimension.
    """
    parts = [_tensors(_read_part(part), model_key, Path(source)) for part in find_parts(Path(source))]
    torch.save({model_key: {name: _join(name, [part[name] for part in parts], model) for name in parts[0]}}, target)


def find_parts(directory: Path) -> list[Path]:
    """The parts of a sharded checkpoint in the order of their ranks.

    Raises:
        CheckpointError: there are none, some are missing, or it is pipeline-parallel.
    """
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        match = _PART.fullmatch(path.name)
        if match and int(match[2]):
            raise CheckpointError(f"{directory} is pipeline-parallel ({path.name}); tpray reads tensor-parallel ones")
        if match:
            found.setdefault(int(match[1]), path)
    if not found:
        raise CheckpointError(
            f"{directory} does not hold a sharded checkpoint: there is no tp_rank_00_pp_rank_00 in it; a checkpoint in "
            "one file is read with sharded=False"
        )
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise CheckpointError(f"{directory} lacks the parts of the ranks {', '.join(map(str, missing))}")
    return [found[rank] for rank in sorted(found)]


def _read_part(part: Path) -> Any:
    if part.is_dir():
        return _read_file(part / "checkpoint.pt")
    folder = part.with_name(f"{part.name}.tensors")

    def resolve(value: Any) -> Any:
        if type(value).__name__ == "TensorReference":
            if not isinstance(value.tid, int):
                raise CheckpointError(f"{part} is damaged: it names a tensor {value.tid!r}, and they have numbers")
            return _read_file(folder / f"tensor_{value.tid}.pt")
        if isinstance(value, Mapping):
            return {key: resolve(inner) for key, inner in value.items()}
        return type(value)(map(resolve, value)) if isinstance(value, (list, tuple)) else value

    return resolve(_read_file(part))


def _read_file(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(TensorReference, "torch_xla.utils.serialization.TensorReference")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"there is no checkpoint {path}") from e
    except Exception as e:  # torch.load raises many types for a damaged file
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {str(e).splitlines()[0]}") from e


def _tensors(saved: Any, key: str | None, path: Path) -> Mapping[str, Tensor]:
    found = saved.get(key) if key is not None and isinstance(saved, Mapping) else saved
    if not isinstance(found, Mapping):
        keys = ", ".join(map(repr, list(saved)[:4])) if isinstance(saved, Mapping) else type(saved).__name__
        raise CheckpointError(f"{path} holds {keys} and no {key!r} with the tensors: name it with model_key")
    return found


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, strict: bool, whole: bool) -> None:
    targets = model.state_dict(keep_vars=True)
    missing, unexpected = [n for n in targets if n not in tensors], [n for n in tensors if n not in targets]
    if strict and (missing or unexpected):
        sides = [f"it lacks {_some(missing)}" if missing else "", f"it has {_some(unexpected)}" if unexpected else ""]
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(filter(None, sides))}, which the model "
            f"{'wants' if missing else 'has no place for'}"
        )
    wrong = []
    for name, target in targets.items():
        if name not in tensors:
            continue
        value, part = tensors[name], partition_of(target)
        if whole and part is not None and value.dim() > part.dim and value.shape[part.dim] == part.full:
            value = part.cut(value)
        if value.shape != target.shape:
            full = list(target.shape)
            if whole and part is not None:
                full[part.dim] = part.full
            wrong.append(f"{name} is {list(tensors[name].shape)} there and {full} in the model")
            continue
        with torch.no_grad():
            target.copy_(value)
    if wrong:
        raise CheckpointError(f"{path} has tensors of other shapes than {type(model).__name__}: {_some(wrong, '; ')}")


def _join(name: str, parts: list[Tensor], model: nn.Module) -> Tensor:
    """The whole of which every rank saved a part, evenly shared, as upstream's layers do.

    Raises:
        CheckpointError: the parts overlap or differ in size.
    """
    target = model.state_dict(keep_vars=True).get(name)
    part: Partition | None = None if target is None else partition_of(target)
    if target is None or part is None:
        return parts[0]
    shape = list(parts[0].shape)
    shape[part.dim] = sum(piece.shape[part.dim] for piece in parts)
    if not part.even:
        raise CheckpointError(
            f"{name} is held by {len(parts)} ranks in parts that overlap or differ in size, which are not put "
            "together: load it with as many ranks as saved it, or load a whole checkpoint"
        )
    whole = parts[0].new_empty(shape)
    for rank, piece in enumerate(parts):
        offset = 0
        number = part_number(target, rank) if len(parts) == getattr(target, "num_partitions", 0) else rank
        for start, stop in shard_bounds(shape[part.dim], number, len(parts), part.stride):
            whole.narrow(part.dim, start, stop - start).copy_(piece.narrow(part.dim, offset, stop - start))
            offset += stop - start
    return whole.narrow(part.dim, 0, min(part.full, shape[part.dim]))  # without what was padded


def _some(names: list[str], between: str = ", ") -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return between.join(names[:4]) + more
