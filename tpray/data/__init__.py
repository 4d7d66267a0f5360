"""Ray Data: groups as the actors of ``map_batches``. No HTTP, and no command's output.

Here too is what records and their answers look like, in a table as in a file: `columns` and `answers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Classifier", "classify"]

if TYPE_CHECKING:
    from tpray.data.classifier import Classifier, classify


def __getattr__(name: str) -> Any:
    if name in __all__:  # brings Ray, which the commands need not wait for
        from tpray.data import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'tpray.data' has no attribute {name!r}")
