"""Cut a whole checkpoint for one rank of a model with parallel layers.

Names and arguments are those of neuronx-distributed's ``trace.trace``. The checkpoint is a dict of whole tensors, which
becomes the rank's, in place.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from tpray.errors import CheckpointError, ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.partition import Partition, is_sharded, part_number, partition_of, shard_bounds

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


def get_sharded_checkpoint(
    checkpoint: StateDict, model: nn.Module, rank: int, tp_degree: int, is_cached: bool = False
) -> None:
    """Pad, cut and clear a checkpoint for ``rank``.

    Args:
        model: built on any rank; see `shard_children`.
        is_cached: it was prepared by `preprocess_checkpoint` before.

    Raises:
        CheckpointError: a tensor has another shape than the model's; it is named.
    """
    if not is_cached:
        preprocess_checkpoint(model, checkpoint)
    shard_children(model, checkpoint, "", None, rank, tp_degree)


def preprocess_checkpoint(model: nn.Module, checkpoint: StateDict) -> None:
    """Let layers pad their tensors, and drop tensors that the model has no place for."""
    invoke_preshard_hook(model, checkpoint, "")
    known = model.state_dict()
    dropped = [name for name in checkpoint if name not in known]
    if dropped:
        log.warning("the checkpoint has tensors that the model has no place for: %s", ", ".join(dropped))
    for name in dropped:
        del checkpoint[name]


def invoke_preshard_hook(module: nn.Module | None, checkpoint: StateDict, prefix: str) -> None:
    """Call ``preshard_hook`` of each module that has one, for each of its own parameters."""
    if module is None:
        return
    hook: Any = getattr(module, "preshard_hook", None)
    if hook is not None:
        for name, _ in module.named_parameters(recurse=False):
            hook(checkpoint, prefix + name)
    for name, child in module.named_children():
        invoke_preshard_hook(child, checkpoint, f"{prefix}{name}.")


def shard_children(
    module: nn.Module | None,
    checkpoint: StateDict,
    prefix: str,
    dtype: torch.dtype | None,
    rank: int,
    tp_degree: int,
    is_lora_cpu_shard: bool = False,
) -> None:
    """Cut what ``module`` and its children hold parts of; whole tensors stay.

    Args:
        prefix: of the module's tensors in the checkpoint.
        dtype: not used, as upstream.
        rank: whose parts. Of layers whose ranks' parts differ in size or are shared, the model must have been built on
            that rank.
        is_lora_cpu_shard: refused.

    Raises:
        CheckpointError: a part has another shape than its parameter; it is named.
        ConfigError: LoRA, or a layer that was built on another rank.
    """
    if module is None:
        return
    if is_lora_cpu_shard:
        raise ConfigError("tpray does not shard LoRA weights: merge them into the model first")
    for path, parameter in module.named_parameters(remove_duplicate=False):
        name = prefix + path
        if name not in checkpoint or not is_sharded(parameter):
            continue
        part = _part(name, parameter, rank, tp_degree)
        cut = part.cut(checkpoint[name]) if checkpoint[name].shape[part.dim] == part.full else checkpoint[name]
        if cut.shape != parameter.shape:
            raise CheckpointError(
                f"{name}: the part of rank {rank} is {list(cut.shape)}, and the model's {list(parameter.shape)}"
            )
        checkpoint[name] = cut.clone()  # of its own memory, so that the whole can be freed


def _part(name: str, parameter: Tensor, rank: int, tp_degree: int) -> Partition:
    known = partition_of(parameter)
    assert known is not None, "it is sharded"
    built = parallel_state.current().rank if parallel_state.model_parallel_is_initialized() else None
    if known.even:
        size = int(getattr(parameter, "num_partitions", tp_degree))
        full = known.own * size  # with the padding, which the layer's hook has added
        bounds = shard_bounds(full, part_number(parameter, rank) % size, size, known.stride)
        return Partition(known.dim, full, bounds, known.stride)
    if built != rank:
        raise ConfigError(
            f"{name} is cut on its own rank: build the model within parallel_state.use({rank}, {tp_degree})"
        )
    return known
