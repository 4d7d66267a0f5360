"""torch_neuronx.contexts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_stopped = False


def disabled() -> bool:
    """Whether modules are loaded without going to a core."""
    return _stopped


@contextmanager
def disable_nrt_load() -> Iterator[None]:
    """Modules are loaded without going to a core.

    Rule: it holds for the process and does not count: the first of two threads that leaves it ends it for both
    (torch-neuronx 1.13.1, ``_StopNrtLoadContext``, whose count is each instance's own).
    """
    global _stopped
    _stopped = True
    try:
        yield
    finally:
        _stopped = False
