"""The load generator against servers that answer, fail, refuse and hang."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from tpray.commands.load_generator import (
    Generator,
    Load,
    Outcome,
    check_plots,
    curves,
    generated,
    plot,
    read_texts,
)
from tpray.errors import ConfigError, InputError, TprayError

Handler = Callable[[web.Request], Awaitable[web.Response]]


def measure(handler: Handler, loads: list[Load], seconds: float = 0.5, timeout_s: float = 30.0) -> list[Outcome]:
    async def run() -> list[Outcome]:
        app = web.Application()
        app.router.add_post("/predict", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            generator = Generator(f"http://127.0.0.1:{port}", ["a", ["b", "c"]], timeout_s)
            return await generator.run(loads, seconds, 0.0, limit=1000)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


async def fine(request: web.Request) -> web.Response:
    await asyncio.sleep(0.01)
    assert (await request.json())["inputs"] in ("a", ["b", "c"])
    return web.json_response([], headers={"x-compute-tokens": "7"})


def test_closed_loops() -> None:
    one, four = measure(fine, [Load(concurrency=1), Load(concurrency=4)])
    assert one.errors == four.errors == {}
    assert 10 < len(one.latencies_ms) <= 50  # ten milliseconds each, one after the other
    assert len(four.latencies_ms) > 2 * len(one.latencies_ms)
    assert one.percentile(50) >= 10
    assert one.tokens == 7 * len(one.latencies_ms)
    assert one.summary()["requests_per_s"] == pytest.approx(len(one.latencies_ms) / one.seconds, abs=0.01)


def test_an_open_loop_keeps_its_rate_and_counts_from_when_a_request_was_due() -> None:
    async def one_at_a_time(request: web.Request) -> web.Response:
        async with lock:
            await asyncio.sleep(0.02)
        return web.json_response([])

    lock = asyncio.Lock()
    (outcome,) = measure(one_at_a_time, [Load(rate=100.0)], seconds=1.0)
    assert 60 < len(outcome.latencies_ms) < 150
    # Twice as many come as the server can take: the queue, and with it the latency, must be seen to grow.
    assert outcome.percentile(99) > 10 * min(outcome.latencies_ms)


def test_failures_are_counted_by_their_reason_and_end() -> None:
    seen = 0

    async def bad(request: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        if seen % 3 == 1:
            return web.Response(status=429)
        if seen % 3 == 2:
            await asyncio.sleep(30)
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    started = time.monotonic()
    (outcome,) = measure(bad, [Load(concurrency=3)], seconds=0.6, timeout_s=0.2)
    assert time.monotonic() - started < 5
    assert not outcome.latencies_ms
    assert set(outcome.errors) == {"HTTP 429", "no answer within 0.2 s", "ServerDisconnectedError"}
    assert outcome.summary()["p50_ms"] is None


def test_no_server(free_port: Callable[[], int]) -> None:
    generator = Generator(f"http://127.0.0.1:{free_port()}", ["a"])
    with pytest.raises(TprayError, match="no server answers"):
        asyncio.run(generator.run([Load(concurrency=1)], 1, 0, 10))


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text('plain text\n\n{"text": "a"}\n{"text": "a", "text_pair": "b"}\n')
    assert read_texts(file) == ["plain text", "a", ["a", "b"]]
    file.write_text('{"txt": "a"}\n')
    with pytest.raises(InputError, match="line 1"):
        read_texts(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no text in it"):
        read_texts(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_texts(tmp_path / "none")
    lengths = [len(text.split()) for text in generated(53, 15, 16, 128, pairs=False)]
    assert (min(lengths), max(lengths)) >= (16, 80)
    assert sum(lengths) / len(lengths) == pytest.approx(53, abs=3)
    assert generated(10, 0, 1, 20, pairs=True) == generated(10, 0, 1, 20, pairs=True)


def test_a_plot_says_the_load_of_each_of_its_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    outcomes = measure(fine, [Load(concurrency=1), Load(concurrency=3), Load(rate=50.0)], seconds=0.3)
    plot(curves(outcomes), tmp_path / "plot.png", "a server")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot(curves(outcomes), tmp_path / "plot.svg", "a server", log=True)
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("closed loop, p50", "open loop, p99", "3", "50/s"))
    assert json.loads(json.dumps([o.summary() for o in outcomes]))[2]["rate"] == 50.0


def test_a_plot_of_an_unknown_kind_is_refused_before_the_load() -> None:
    with pytest.raises(ConfigError, match=r"--plot plot\.txt: give a file whose name ends in \.png or \.svg"):
        check_plots(Path("plot.txt"))
