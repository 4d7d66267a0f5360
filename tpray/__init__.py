"""tpray: tensor-parallel transformer classifiers on Ray.

``tpray.load(MODEL, tp=2)`` gives a group to use from Python; ``tpray serve`` puts one behind HTTP, and
``tpray.connect()`` gives its Serve handle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "connect", "load"]

if TYPE_CHECKING:
    from tpray.serving.launch import connect
    from tpray.serving.local import load


def __getattr__(name: str) -> Any:
    if name == "load":  # brings torch and Ray, which `tpray --help` need not wait for
        from tpray.serving.local import load

        return load
    if name == "connect":
        from tpray.serving.launch import connect

        return connect
    raise AttributeError(f"module 'tpray' has no attribute {name!r}")
