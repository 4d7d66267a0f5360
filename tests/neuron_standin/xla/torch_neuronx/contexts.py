"""torch_neuronx.contexts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_state = threading.local()


def disabled() -> bool:
    """Whether this thread is within `disable_nrt_load`."""
    return bool(getattr(_state, "depth", 0))


@contextmanager
def disable_nrt_load() -> Iterator[None]:
    """Modules are loaded without going to a core."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1
