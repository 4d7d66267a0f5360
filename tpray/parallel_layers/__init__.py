"""What tensor parallelism is: layers, their collectives, the plan that places them, their checkpoints.

Knows no Ray and no HTTP. Read `plan`, then `layers`, `collective`, `checkpoint`, `shard`, `sharded`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpray.parallel_layers import layers, parallel_state
    from tpray.parallel_layers.sharded import load, merge, save

__all__ = ["layers", "load", "merge", "parallel_state", "save"]

_MODULES = ("layers", "parallel_state")


def __getattr__(name: str) -> Any:
    # Not before they are used: they bring torch, which a group's owner need not wait for.
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(import_module(f"{__name__}.sharded"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
