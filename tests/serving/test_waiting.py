"""What ends the waiting of a request, without a task or a timer for each."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tpray.errors import DeadlineError
from tpray.serving.waiting import PATIENCE_S, ClientLeftError, Waiting


def test_a_block_ends_at_its_own_deadline_whatever_the_others_are() -> None:
    async def main() -> None:
        waiting, began, ended = Waiting(), time.monotonic(), list[float]()

        async def wait(after_s: float) -> None:
            with pytest.raises(DeadlineError), waiting.until(began + after_s, DeadlineError("late")):
                await asyncio.sleep(60)
            assert time.monotonic() >= began + after_s
            ended.append(after_s)

        await asyncio.gather(*map(wait, (0.3, 0.1, 0.2, -1.0)))
        assert ended == [-1.0, 0.1, 0.2, 0.3]

    asyncio.run(main())


def test_many_blocks_have_one_timer() -> None:
    async def main() -> None:
        waiting = Waiting()
        loop: Any = asyncio.get_running_loop()

        async def wait() -> None:
            with waiting.until(time.monotonic() + 60, DeadlineError("late")):
                await asyncio.sleep(0.01)

        for _ in range(3):
            await asyncio.gather(*(wait() for _ in range(100)))
        assert len([timer for timer in loop._scheduled if not timer.cancelled()]) == 1

    asyncio.run(main())


def test_a_cancellation_by_somebody_else_goes_through() -> None:
    async def main() -> None:
        waiting = Waiting()

        async def wait() -> None:
            with waiting.until(time.monotonic() + 0.05, DeadlineError("late")):
                await asyncio.sleep(5)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)  # and the deadline of a block that was left ends nothing

    asyncio.run(main())


def test_a_task_goes_on_after_a_block_that_ended() -> None:
    """Catches a cancellation that is still counted: `asyncio.timeout` would take the next one for somebody else's."""

    async def main() -> None:
        waiting = Waiting()
        outer, inner = DeadlineError("outer"), DeadlineError("inner")
        now = time.monotonic()
        with pytest.raises(DeadlineError, match="inner"), waiting.until(now + 5, outer):  # noqa: SIM117  # nested
            with waiting.until(now + 0.02, inner):
                await asyncio.sleep(5)
        task: Any = asyncio.current_task()
        assert getattr(task, "cancelling", int)() == 0
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(5), 0.02)

    asyncio.run(main())


def test_who_waits_is_told_that_the_client_has_left_and_who_does_not_wait_is_not_watched() -> None:
    async def main() -> None:
        waiting, left, listening = Waiting(), asyncio.Event(), 0

        async def receive() -> dict[str, str]:
            nonlocal listening
            listening += 1
            await left.wait()
            return {"type": "http.disconnect"}

        async def wait(seconds: float) -> None:
            with waiting.until(time.monotonic() + 9, DeadlineError("late")) as block:
                block.listen(receive)
                await asyncio.sleep(seconds)

        await asyncio.gather(*(wait(0.001) for _ in range(20)))
        await asyncio.sleep(2 * PATIENCE_S)
        assert listening == 0
        asyncio.get_running_loop().call_later(3 * PATIENCE_S, left.set)
        with pytest.raises(ClientLeftError):
            await wait(5)
        assert listening == 1
        left.clear()
        await wait(2 * PATIENCE_S)  # nobody left
        assert listening == 2
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
