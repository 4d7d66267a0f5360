"""The state of a group: one machine, which everybody asks and only the group moves.

::

    new ──> starting ──> ready ──> failed
               │ ▲         │       │  │
               │ └─────────│───────┘  │     the supervisor restarts a failed group
               ▼           ▼          ▼
             failed      stopped    stopped

Any state may become ``stopped``, and that is the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

from tpray.errors import GroupError, NotReadyError


class State(StrEnum):
    """What a group is doing."""

    NEW = "new"  # nothing was started
    STARTING = "starting"  # its ranks come up; they run only what the start itself sends
    READY = "ready"  # it takes steps
    FAILED = "failed"  # a rank died, failed or was late; it will be restarted
    STOPPED = "stopped"  # it was stopped, or given up; it will never take a step again


_NEXT: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.STARTING, State.STOPPED}),
    State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.READY: frozenset({State.FAILED, State.STOPPED}),
    State.FAILED: frozenset({State.STARTING, State.STOPPED}),
    State.STOPPED: frozenset(),
}


class Lifecycle:
    """The state machine. Used on the event loop of its group only.

    ``error`` is why the group is not ready: what made it fail, or why it was stopped. ``restarts`` counts how often it
    came back.
    """

    def __init__(self) -> None:
        self.state = State.NEW
        self.error: GroupError | None = None
        self.restarts = 0
        self._watchers: list[Callable[[], object]] = []

    def move(self, to: State, error: GroupError | None = None) -> None:
        """Go to the state ``to``; whoever watches is told. error: why, for `FAILED` and `STOPPED`."""
        assert to in _NEXT[self.state], f"a group that is {self.state.value} cannot become {to.value}"
        assert (error is not None) == (to in (State.FAILED, State.STOPPED)), (
            "what fails or stops says why, and only that"
        )
        if to is State.READY:
            self.restarts += self.error is not None
            self.error = None
        self.error = error or self.error
        self.state = to
        for watcher in list(self._watchers):
            watcher()

    def watch(self, watcher: Callable[[], object]) -> None:
        """Have ``watcher`` called after every move; it must not block, nor move."""
        self._watchers.append(watcher)

    def why_not_ready(self) -> GroupError:
        """Why the group takes no steps, as an error to raise."""
        if self.state is State.STOPPED:
            assert self.error is not None, "move() keeps it"
            return self.error
        if self.error is not None:
            return NotReadyError(f"the group is restarting: {self.error}")
        return NotReadyError("the group was not started" if self.state is State.NEW else "the group is starting")

    def check_ready(self) -> None:
        """Raise `GroupError` unless the group takes steps."""
        if self.state is not State.READY:
            raise self.why_not_ready()

    async def until(self, *states: State) -> State:
        """Wait until the group reaches one of these states, and say which; it may have left it again by then."""
        if self.state in states:
            return self.state
        reached: asyncio.Future[State] = asyncio.get_running_loop().create_future()

        def watcher() -> None:
            if self.state in states and not reached.done():
                reached.set_result(self.state)

        self._watchers.append(watcher)
        try:
            return await reached
        finally:
            self._watchers.remove(watcher)

    async def until_ready(self) -> None:
        """Wait until the group takes steps.

        Raises:
            GroupError: it was stopped, or given up, and never will.
        """
        if await self.until(State.READY, State.STOPPED) is State.STOPPED:
            raise self.why_not_ready()
