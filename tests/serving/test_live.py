"""The stream of what a group does: its events, and what ends it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.serving.conftest import WithEngine
from tests.serving.test_http import client
from tpray.group.fake_executor import FakeExecutor
from tpray.group.lifecycle import State
from tpray.serving import live
from tpray.serving.door import Door
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.http import make_app
from tpray.serving.load import KEPT_S, Load

Event = tuple[str, dict[str, Any]]


class Listener:
    """One client of a stream."""

    def __init__(self, app: Door) -> None:
        self.left, self.events, self.status = asyncio.Event(), asyncio.Queue[Event](), 0
        self.body = b""
        scope = {"type": "http", "method": "GET", "path": live.PATH, "headers": [], "query_string": b""}
        self.ended = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> MutableMapping[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        for block in message.get("body", b"").decode().split("\n\n"):
            if block.startswith("event: "):
                name, data = block.removeprefix("event: ").split("\ndata: ")
                self.events.put_nowait((name, json.loads(data)))

    async def next(self, name: str) -> dict[str, Any]:
        while True:
            got, data = await asyncio.wait_for(self.events.get(), 5)
            if got == name:
                return data


@asynccontextmanager
async def listening(app: Door) -> AsyncIterator[Listener]:
    listener = Listener(app)
    try:
        yield listener
    finally:
        listener.left.set()
        await asyncio.wait_for(listener.ended, 5)


def test_a_stream_tells_what_the_group_is_and_does(with_fake_engine: WithEngine) -> None:
    """At once what was before, then each second what came since; again what it is, once it has restarted."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine, groups=2)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tpray") as http:
            told, changes = (await http.get("/info")).json(), dict.fromkeys(("metrics", "load", "uptime_s"))
            answer = await http.post("/predict", json={"inputs": [["a"], ["b", "c"]]})
            while engine.load.now == engine.load._seconds[-1].number:
                await asyncio.sleep(0.05)
            async with listening(app) as listener:
                info = await listener.next("info")
                assert info | changes == told | changes
                assert info["inputs"] == ["text", "pair", "query"]
                assert info["group"]["groups"] == 2
                load = await listener.next("load")
                assert (load["state"], load["error"], load["restarts"]) == ("ready", None, 0)
                texts, tokens = (sum(second[of] for second in load["seconds"]) for of in (2, 3))
                assert (texts, tokens) == (2, int(answer.headers["x-compute-tokens"]))
                assert (await listener.next("load"))["seconds"] == []
                executor.die(0)
                await engine.group.lifecycle.until(State.FAILED, State.STARTING)
                await engine.group.lifecycle.until_ready()
                assert (await listener.next("info"))["restarts"] == 1

    with_fake_engine(work)


def test_a_stream_does_not_keep_a_server_from_stopping(with_fake_engine: WithEngine) -> None:
    """It is not under way as a request is, ends when the gate closes, and is refused from then on."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        gate = Gate()
        app = make_app(engine, gate)
        async with listening(app) as listener:
            await listener.next("load")
            assert gate.under_way == 0
            began = time.monotonic()
            assert await gate.close(5) == 0
            await asyncio.wait_for(listener.ended, 0.5)
            assert time.monotonic() - began < 0.5
        async with listening(app) as late:
            await asyncio.wait_for(late.ended, 0.5)
            assert late.status == 503

    with_fake_engine(work)


def test_streams_are_bounded_and_those_of_clients_that_left_are_free(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        app = make_app(engine)
        first = [Listener(app) for _ in range(live.LISTENERS)]
        for listener in first:
            await listener.next("load")
        async with listening(app) as more:
            await asyncio.wait_for(more.ended, 1)
            assert more.status == 429
            assert b"16 clients follow this group, and that is the limit" in more.body
        first[0].left.set()
        await asyncio.wait_for(first[0].ended, 1)
        async with listening(app) as more:
            await more.next("load")
        for listener in first:
            listener.left.set()
        await asyncio.gather(*(listener.ended for listener in first))

    with_fake_engine(work)


def test_the_page_is_whole_and_guarded(with_fake_engine: WithEngine) -> None:
    """Every file that it names is there, and no script runs but its own."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            for path in ("/", "/docs"):
                page = await http.get(path)
                assert page.headers["content-type"].startswith("text/html")
                assert "script-src 'self';" in page.headers["content-security-policy"]
                assets = re.findall(r"(?:src|href)=\"([^\"]+\.\w+)\"", page.text)
                assert [(await http.get(f"/{asset}")).status_code for asset in assets] == [200] * len(assets) != []
            assert (await http.get("/page/page.js")).headers["content-type"].startswith("text/javascript")
            assert (await http.head("/")).status_code == 200
            assert (await http.get("/page/absent.js")).status_code == 404
            assert (await http.get("/page/../http.py")).status_code == 404

    with_fake_engine(work)


def test_load_keeps_the_last_seconds_only() -> None:
    now = [0.0]
    load = Load(lambda: now[0])
    for second in range(2 * KEPT_S):
        now[0] = second + 0.5
        load.add(2, 10, 0.25)
        load.add(1, 5, 0.25)
    assert load.now == 2 * KEPT_S - 1
    kept = load.between(0, load.now)
    assert len(kept) == KEPT_S - 1
    assert kept[-1] == (load.now - 1, 2, 3, 15, 0.5)
    assert load.between(load.now - 2, load.now) == kept[-2:]
