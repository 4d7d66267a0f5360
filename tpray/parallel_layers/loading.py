"""Fill a model with a checkpoint's weights: each rank reads only its own part of each tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpray.errors import CheckpointError
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.parallel_layers.layers import Partition, mark_sharded, partition_of
from tpray.parallel_layers.weights import Reader, open_weights
from tpray.parallel_layers.words import HEAD, output_embedding


def check_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Compare names and shapes of what is stored with the whole ``module``, on the meta device; no tensor is read.

    Raises:
        CheckpointError: as `load_shard`.
    """
    slices = _slices(module, checkpoint)
    _check_names(module, checkpoint, slices)
    readers = {path: open_weights(path) for path in sorted({own.path for own in slices.values()})}
    for name, parameter in module.named_parameters():
        own = slices[name]
        _check_shape(readers[own.path], own, name, list(parameter.shape))


def load_shard(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Fill ``module``, built on the meta device with parallel layers, with this rank's part of each tensor.

    Sharded parameters are cut while they are read: of a safetensors file only the rank's own bytes.

    Raises:
        CheckpointError: tensors are missing or have other shapes than the model's; the first are named.
    """
    slices = _slices(module, checkpoint)
    parameters, buffers = dict(module.named_parameters(remove_duplicate=False)), _persistent_buffers(module)
    _check_names(module, checkpoint, slices)
    readers: dict[Path, Reader] = {}
    read: dict[tuple[_Slice, Partition | None], Tensor] = {}
    for name, target in (parameters | buffers).items():
        own = slices.get(name)
        if own is None:
            continue  # a buffer that the model makes itself
        if own.path not in readers:
            readers[own.path] = open_weights(own.path)
        key = own, partition_of(target)
        if key not in read:  # tied parameters are one tensor
            value = _read(readers[own.path], own, name, target)
            read[key] = value.to(dtype) if value.is_floating_point() else value
        _assign(module, name, read[key])


def stream_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Have ``module``, built on the meta device, read each layer's weights in float32 when it computes.

    They are let go behind the layer, so that a model runs in the memory of its largest tensor. A model that takes a
    layer's weights without calling the layer gives results on the meta device.

    Raises:
        CheckpointError: as `load_shard`.
    """
    module.float()  # some code reads the dtype of a layer that has not been called
    slices = _slices(module, checkpoint)
    _check_names(module, checkpoint, slices)
    readers = {path: open_weights(path) for path in sorted({own.path for own in slices.values()})}
    for name, target in _persistent_buffers(module).items():
        if name in slices:
            _assign(module, name, _read(readers[slices[name].path], slices[name], name, target))
    paths = {id(each): path for path, each in module.named_modules(remove_duplicate=False)}

    def read(layer: nn.Module, *_: object) -> None:
        for leaf, empty in list(layer._parameters.items()):
            if empty is not None:
                name = f"{paths[id(layer)]}.{leaf}".removeprefix(".")
                value = _read(readers[slices[name].path], slices[name], name, empty)
                wide = value if type(layer) is nn.Embedding else value.float()
                layer._parameters[leaf] = nn.Parameter(wide, requires_grad=False)

    def let_go(layer: nn.Module, _: object, output: Any) -> Any:
        for leaf, held in list(layer._parameters.items()):
            if held is not None:
                layer._parameters[leaf] = nn.Parameter(held.to("meta"), requires_grad=False)
        # Of an embedding, the largest of a model's tensors, only what is looked up is widened.
        return output.float() if type(layer) is nn.Embedding else output

    for layer in module.modules():
        if layer._parameters:
            layer.register_forward_pre_hook(read)
            layer.register_forward_hook(let_go, always_call=True)


def _is_head(name: str) -> bool:
    return "classif" in name or name.startswith("score")


def _check_names(module: nn.Module, checkpoint: Checkpoint, slices: dict[str, _Slice]) -> None:
    missing = [name for name, _ in module.named_parameters() if name not in slices]
    if missing:
        known = set(module.state_dict())
        used = {own.stored for name, own in slices.items() if name in known}
        unused = [stored for stored in checkpoint.weight_files if stored not in used]
        raise CheckpointError(
            f"{checkpoint.source} lacks {len(missing)} tensors of a {type(module).__name__}, among them "
            f"{', '.join(missing[:4])}; it has {', '.join(unused[:4]) or 'nothing'} besides"
            + (
                "; was it saved without a classification head?"
                if any("classif" in m or m.startswith("score") for m in missing)
                else ""
            )
        )


@dataclass(frozen=True)
class _Slice:
    """Where a tensor is stored: file, name there, and which of how many equal parts along its first dimension.

    rows: it is these rows of what is stored.
    """

    path: Path
    stored: str
    part: int = 0
    parts: int = 1
    rows: tuple[int, ...] = ()


def _slices(module: Any, checkpoint: Checkpoint) -> dict[str, _Slice]:
    """Where each tensor of the model is stored, by the model's names; with words, where their rows are."""
    found = _stored(module, checkpoint)
    if checkpoint.words:
        language_model, output = output_embedding(checkpoint.config, checkpoint.source)
        whole = _stored(language_model, checkpoint).get(output)
        if whole is None:
            raise CheckpointError(
                f"{checkpoint.source} lacks its output embedding, {output}, which tie_word_embeddings in config.json "
                "does not tie to the input's: correct either"
            )
        found[HEAD] = replace(whole, rows=checkpoint.word_ids)
    return found


def _stored(module: Any, checkpoint: Checkpoint) -> dict[str, _Slice]:
    """Where each tensor of ``module`` is stored, by its names.

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
    tied: dict[str, str] = module.all_tied_weights_keys  # of which a checkpoint need only have one
    for source in set(tied.values()):
        names = [source, *(name for name, other in tied.items() if other == source)]
        known = next((found[name] for name in names if name in found), None)
        found |= {name: known for name in names if known is not None and name not in found}
    return found


def _check_shape(reader: Reader, own: _Slice, name: str, full: list[int]) -> None:
    stored = reader.shape(own.stored)
    expected = [full[0] * own.parts, *full[1:]] if full else full
    if own.rows:
        expected = [stored[0], *full[1:]]
    if stored != expected:
        raise CheckpointError(
            f"the tensor {name} has the shape {stored} in {reader.path.name} and {expected} in the model that "
            "config.json describes"
        )


def _read(reader: Reader, own: _Slice, name: str, target: Tensor) -> Tensor:
    part = partition_of(target)
    full = list(target.shape)
    if part is not None:
        full[part.dim] = part.full
        full = full[::-1] if part.transposed else full
    _check_shape(reader, own, name, full)
    start = own.part * full[0] if full else 0
    if own.rows:
        return torch.cat([reader.piece(own.stored, 0, row, row + 1) for row in own.rows])
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
