"""Asks a group its canary again while it serves: now and then when it has nothing to do, and when somebody asks.

What a canary can find, and what it cannot: `tpray.runtime.canary`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from tpray.errors import GroupError
from tpray.group.lifecycle import Lifecycle, State

SHARE = 0.01
"""Largest share of the time that the canary takes when nobody asks for it: a costly one is asked less often."""
RECENT_S = 1.0
"""A whole canary that was answered within this time is not asked again."""
POLL_S = 0.1
"""How often a busy group is looked at, to find it idle."""


class Checked(Protocol):
    """What a watch needs of a group."""

    lifecycle: Lifecycle

    @property
    def canary_steps(self) -> int:
        """How many steps the canary has."""
        ...

    async def check_again(self, number: int) -> None:
        """Ask one step; raises `GroupError`, and the group has failed, if the answer is wrong."""
        ...


class CanaryWatch:
    """Watches ``group``, on its event loop.

    Args:
        idle: whether nothing is queued or running there.
    """

    def __init__(self, group: Checked, idle: Callable[[], bool]) -> None:
        self._group, self._idle = group, idle
        self._watching: asyncio.Task[None] | None = None
        self._asked: asyncio.Task[None] | None = None
        self._answered = float("-inf")  # when `_asked` ended
        self._cost_s = 0.0  # of the last whole canary

    def start(self, interval_s: float) -> None:
        """From now on ask the canary about every ``interval_s`` seconds, in steps while the group is idle; 0: never."""
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.get_running_loop().create_task(self._watch(interval_s)) if interval_s else None

    def stop(self) -> None:
        """Ask nothing any more; what is under way is given up."""
        for task in (self._watching, self._asked):
            if task is not None:
                task.cancel()

    async def check(self) -> None:
        """Ask the whole canary now, busy or not, unless that was done within the last second. Callers share one answer.

        Raises:
            GroupError: an answer is wrong, and the group restarts; or it takes no steps.
        """
        self._group.lifecycle.check_ready()
        await asyncio.shield(self._ask(RECENT_S))

    def suspect(self) -> None:
        """Ask the whole canary soon: a row was answered in a way that damaged weights would explain."""
        if self._group.lifecycle.state is State.READY:
            self._ask(max(RECENT_S, self._cost_s / SHARE))

    def _ask(self, recent_s: float) -> asyncio.Task[None]:
        """The canary that is under way, or was answered within ``recent_s``; otherwise a new one."""
        if self._asked is None or (self._asked.done() and time.monotonic() - self._answered > recent_s):
            self._asked = asyncio.get_running_loop().create_task(self._ask_all(at_once=True))
            self._asked.add_done_callback(self._on_answered)
        return self._asked

    def _on_answered(self, task: asyncio.Task[None]) -> None:
        self._answered = time.monotonic()
        if not task.cancelled():
            task.exception()  # marks it seen: nobody may wait for it

    async def _ask_all(self, at_once: bool) -> None:
        cost_s = 0.0
        for number in range(self._group.canary_steps):
            while not (at_once or self._idle()):
                await asyncio.sleep(POLL_S)
            started = time.monotonic()
            await self._group.check_again(number)
            cost_s += time.monotonic() - started
        self._cost_s = cost_s

    async def _watch(self, interval_s: float) -> None:
        while self._group.lifecycle.state is not State.STOPPED:
            await asyncio.sleep(max(interval_s, self._cost_s / SHARE))
            try:
                await self._group.lifecycle.until_ready()
                await self._ask_all(at_once=False)
            except GroupError:  # the group has failed, which its supervisor knows; or it is stopped
                continue
