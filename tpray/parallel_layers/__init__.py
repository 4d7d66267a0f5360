"""What tensor parallelism is: layers, their collectives, the plan that places them, their checkpoints.

Knows no Ray and no HTTP. Read `plan`, then `layers`, `collective`, `checkpoint`, `shard`, `sharded`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load", "merge", "save"]

if TYPE_CHECKING:
    from tpray.parallel_layers.sharded import load, merge, save


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before they are used: they bring torch, which a group's owner need not wait for
        from tpray.parallel_layers import sharded

        return getattr(sharded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
