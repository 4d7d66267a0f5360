"""The state machine: which moves there are, and what it says of a group that is not ready."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tpray.errors import GroupError, NotReadyError, RankError
from tpray.group.lifecycle import Lifecycle, State

ALLOWED = {
    ("new", "starting"), ("new", "stopped"), ("starting", "ready"), ("starting", "failed"), ("starting", "stopped"),
    ("ready", "failed"), ("ready", "stopped"), ("failed", "starting"), ("failed", "stopped"),
}  # fmt: skip
WAY = {"new": [], "starting": ["starting"], "ready": ["starting", "ready"],
       "failed": ["starting", "failed"], "stopped": ["stopped"]}  # fmt: skip


def go(lifecycle: Lifecycle, *states: str) -> None:
    for name in states:
        state = State(name)
        lifecycle.move(state, RankError("rank 1 died") if state in (State.FAILED, State.STOPPED) else None)


@pytest.mark.parametrize(("start", "to"), itertools.product(WAY, WAY))
def test_only_the_drawn_moves_are_possible(start: str, to: str) -> None:
    lifecycle = Lifecycle()
    go(lifecycle, *WAY[start])
    if (start, to) in ALLOWED:
        go(lifecycle, to)
        assert lifecycle.state == to
        return
    with pytest.raises(AssertionError, match=f"a group that is {start} cannot become {to}"):
        go(lifecycle, to)
    assert lifecycle.state == start


def test_what_fails_says_why_and_nothing_else_does() -> None:
    lifecycle = Lifecycle()
    go(lifecycle, "starting")
    with pytest.raises(AssertionError, match="says why"):
        lifecycle.move(State.FAILED)
    with pytest.raises(AssertionError, match="says why"):
        lifecycle.move(State.READY, GroupError("no"))


def test_why_a_group_is_not_ready() -> None:
    lifecycle = Lifecycle()
    said = []
    for state in ("starting", "failed", "starting"):
        with pytest.raises(NotReadyError) as caught:
            lifecycle.check_ready()
        said.append(str(caught.value))
        go(lifecycle, state)
    restarting = "the group is restarting: rank 1 died"
    assert said == ["the group was not started", "the group is starting", restarting]
    with pytest.raises(NotReadyError, match=restarting):
        lifecycle.check_ready()
    go(lifecycle, "ready")
    lifecycle.check_ready()
    assert lifecycle.error is None
    assert lifecycle.restarts == 1
    lifecycle.move(State.STOPPED, GroupError("enough"))
    with pytest.raises(GroupError, match="enough"):
        lifecycle.check_ready()


def test_who_waits_is_woken_by_the_state_it_waits_for() -> None:
    async def main() -> None:
        lifecycle = Lifecycle()
        ready = asyncio.ensure_future(lifecycle.until_ready())
        also = asyncio.ensure_future(lifecycle.until(State.READY, State.FAILED))
        await asyncio.sleep(0)
        go(lifecycle, "starting")
        await asyncio.sleep(0)
        assert not ready.done()
        go(lifecycle, "failed")
        assert await also is State.FAILED
        assert not ready.done()
        go(lifecycle, "stopped")
        with pytest.raises(RankError, match="died"):
            await ready

    asyncio.run(main())
