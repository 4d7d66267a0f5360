"""Work on a thread that keeps nobody waiting: a process that ends, as by Ctrl-C, does not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def on_daemon_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Begin ``work`` on a thread of its own; what becomes of it. A process joins a pool's threads when it ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001  # it belongs to whoever waits
            future.set_exception(e)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
