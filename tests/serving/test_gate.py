"""What a replica lets in."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.conftest import WithEngine
from tests.serving.test_http import client
from tpray.errors import StoppingError
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate


def test_a_gate_that_closes_waits_for_what_is_under_way(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        gate = Gate()
        executor.delay(1, 0.3)
        async with client(engine, gate) as http:
            waiting = asyncio.create_task(http.post("/predict", json={"inputs": "a"}))
            await asyncio.sleep(0.1)
            closing = asyncio.create_task(gate.close(5))
            await asyncio.sleep(0)
            for path in ("/predict", "/health", "/info"):
                refused = await http.request("POST" if path == "/predict" else "GET", path, json={"inputs": "b"})
                assert (refused.status_code, refused.json()["error_type"]) == (503, "Unhealthy")
                assert int(refused.headers["retry-after"]) >= 1
            assert not closing.done()
            assert (await waiting).status_code == 200
            assert await closing == 0

    with_fake_engine(work)


def test_a_gate_does_not_wait_longer_than_the_limit() -> None:
    async def main() -> None:
        gate = Gate()
        with gate.enter():
            assert await gate.close(0.05) == 1
        assert await gate.close(0.05) == 0
        with pytest.raises(StoppingError), gate.enter():
            raise AssertionError("nothing comes in")

    asyncio.run(main())


def test_without_the_token_nothing_is_answered(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, Gate("ours")) as http:
            for headers, status in (({}, 421), ({"x-tpray-server": "theirs"}, 421), ({"x-tpray-server": "ours"}, 200)):
                for path in ("/predict", "/no/such/route", "/docs"):
                    answer = await http.post(path, json={"inputs": "a"}, headers=headers)
                    assert (answer.status_code == 421) == (status == 421), path
            assert len(executor.steps) == 1

    with_fake_engine(work)
