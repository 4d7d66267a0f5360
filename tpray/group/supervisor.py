"""The one that restarts: it waits for a group to fail, and brings it back or gives it up."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from tpray.errors import GroupError
from tpray.group.lifecycle import Lifecycle, State

log = logging.getLogger(__name__)

RESTARTS = 3
"""How often in a row a restart may fail before the group is given up."""
PAUSE_S = 1.0
"""How long to wait after the first restart that failed; after the second, twice as long."""


class Restartable(Protocol):
    """What a supervisor needs of a group."""

    lifecycle: Lifecycle

    async def restart(self) -> None:
        """Bring it from `State.FAILED` to `State.READY`; raises, and is failed again, if that does not succeed."""
        ...

    async def stop(self, reason: GroupError | None = None) -> None:
        """End it for good."""
        ...


class Supervisor:
    """Restarts ``group`` whenever it fails, until it is stopped. After `RESTARTS` failures in a row it gives it up.

    Args:
        pause_s: see `PAUSE_S`.
    """

    def __init__(self, group: Restartable, pause_s: float = PAUSE_S) -> None:
        self._group, self._pause_s = group, pause_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch, on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def release(self) -> asyncio.Task[None] | None:
        """Watch no longer. The task is what watched, perhaps within a restart: to be ended; None if it is who asks."""
        task, self._task = self._task, None
        return None if task is asyncio.current_task() else task

    async def _watch(self) -> None:
        failures = 0
        while await self._group.lifecycle.until(State.FAILED, State.STOPPED) is State.FAILED:
            try:
                await self._group.restart()
                failures = 0
            except (Exception, asyncio.CancelledError) as e:  # any failed restart counts, whatever it raised
                if self._task is None:  # the group is being stopped, and this task ended
                    raise
                failures += 1
                log.error("restart %d of %d failed: %s", failures, RESTARTS, e)
                if failures == RESTARTS:
                    await self._group.stop(GroupError(f"the group could not be brought back: {e}"))
                    return
                await asyncio.sleep(failures * self._pause_s)
