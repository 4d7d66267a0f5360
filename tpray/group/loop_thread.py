"""Use a group from code that knows no asyncio: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop that runs until `stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.stopped = False
        self._lock = threading.Lock()  # nothing is submitted that the loop will not run
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``work`` on the loop; the future has what it returns or raises.

        Raises:
            RuntimeError: the loop was stopped.
        """
        with self._lock:
            if self.stopped:
                work.close()
                raise RuntimeError("this event loop was stopped")
            return self._submit(work)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the loop and wait for what it returns or raises."""
        return self.submit(work).result()

    def stop(self) -> None:
        """End the loop and its thread. What still runs on it is cancelled, so that nobody waits for it for ever."""
        with self._lock:
            if self.stopped:
                return
            self.stopped = True
        self._submit(_cancel_others()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
