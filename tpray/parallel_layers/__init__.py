"""What tensor parallelism is: layers, their collectives, the plan that places them, their checkpoints.

Knows no Ray and no HTTP. Read `plan`, `architectures`, then `partition`, `base`, `layers`, `collective`, `checkpoint`,
`shard` and `sharded`. `conv`, `embedding`, `gqa`, `mappings`, `pad`, `utils` and `preshard` are what scripts from
neuronx-distributed call besides.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpray.parallel_layers import gqa, layers, mappings, pad, parallel_state, utils
    from tpray.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
    from tpray.parallel_layers.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        scatter_to_tensor_model_parallel_region,
    )
    from tpray.parallel_layers.parallel_state import initialize_model_parallel
    from tpray.parallel_layers.sharded import load, merge, save
    from tpray.parallel_layers.utils import (
        copy_tensor_model_parallel_attributes,
        move_model_to_device,
        set_defaults_if_not_set_tensor_model_parallel_attributes,
        set_tensor_model_parallel_attributes,
        split_tensor_along_last_dim,
    )

__all__ = [
    "ColumnParallelLinear",
    "ParallelEmbedding",
    "RowParallelLinear",
    "copy_tensor_model_parallel_attributes",
    "copy_to_tensor_model_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "gqa",
    "initialize_model_parallel",
    "layers",
    "load",
    "mappings",
    "merge",
    "move_model_to_device",
    "pad",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "save",
    "scatter_to_tensor_model_parallel_region",
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "set_tensor_model_parallel_attributes",
    "split_tensor_along_last_dim",
    "utils",
]

_MODULES = ("gqa", "layers", "mappings", "pad", "parallel_state", "utils")
_HOMES = ("sharded", "layers", "mappings", "parallel_state", "utils")


def __getattr__(name: str) -> Any:
    # Not before they are used: they bring torch, which a group's owner need not wait for.
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        homes = (import_module(f"{__name__}.{home}") for home in _HOMES)
        return next(vars(home)[name] for home in homes if name in vars(home))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
