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
RESTARTS_WITHOUT_A_STEP = 8
"""How often in a row a group may come back and fail again without having answered a step, until it is given up."""
PAUSE_S = 1.0
"""How long to wait after the first restart that failed; after the second, twice as long."""


class Restartable(Protocol):
    """What a supervisor needs of a group."""

    lifecycle: Lifecycle
    answered: int  # how many steps, of others than the group itself

    async def restart(self) -> None:
        """Bring it from `State.FAILED` to `State.READY`; raises, and is failed again, if that does not succeed."""
        ...

    async def stop(self, reason: GroupError | None = None) -> None:
        """End it for good."""
        ...


class Supervisor:
    """Restarts ``group`` whenever it fails, until it is stopped.

    It is given up after `RESTARTS` restarts in a row that failed; and after `RESTARTS_WITHOUT_A_STEP`, when it comes
    back each time and fails at whatever step it is given.

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
        failures, fruitless, answered = 0, 0, self._group.answered
        while await self._group.lifecycle.until(State.FAILED, State.STOPPED) is State.FAILED:
            if self._group.answered > answered:
                answered, fruitless = self._group.answered, 0
            if fruitless == RESTARTS_WITHOUT_A_STEP:
                cause = self._group.lifecycle.error
                await self._group.stop(
                    GroupError(f"the group came back {fruitless} times and answered nothing: {cause}")
                )
                return
            try:
                await self._group.restart()
                failures = 0
                fruitless += 1
            except (Exception, asyncio.CancelledError) as e:  # any failed restart counts, whatever it raised
                if self._task is None:  # the group is being stopped, and this task ended
                    raise
                failures += 1
                log.error("restart %d of %d failed: %s", failures, RESTARTS, e)
                if failures == RESTARTS:
                    await self._group.stop(GroupError(f"the group could not be brought back: {e}"))
                    return
                await asyncio.sleep(failures * self._pause_s)
