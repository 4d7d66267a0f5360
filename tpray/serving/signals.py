"""SIGTERM and Ctrl-C: they end a server in order the first time, and at once the second."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


def catch_signals() -> dict[signal.Signals, Any]:
    """Have SIGTERM and SIGINT raise KeyboardInterrupt; the handlers that were there are returned."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    return {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise KeyboardInterrupt in the main thread.

    SIGINT too, because a shell starts a background job with it ignored.
    """

    before = catch_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once_if_asked_again() -> None:
    """From now on Ctrl-C and SIGTERM end this process without waiting for anything; the watchdog ends the rest."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(130))
