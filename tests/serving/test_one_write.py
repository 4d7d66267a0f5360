"""An answer leaves in one write, through uvicorn's own protocol, and the bytes are those that uvicorn writes itself."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.protocols.http import httptools_impl
from uvicorn.server import ServerState

from tpray.serving.one_write import join_writes


class Wire(asyncio.Transport):
    """Keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        if data:
            self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def app(scope: Any, receive: Any, send: Any) -> None:
    """By its path: an answer with a length, in chunks, without a body, that is refused, that ends too early."""
    kind = scope["path"].strip("/")
    if kind == "raises":
        raise RuntimeError("as it happens")
    headers = {"chunks": [], "bad": [(b"a\n", b"b")], "empty": [(b"content-length", b"0")]}.get(
        kind, [(b"content-length", b"4")]
    )
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if kind == "short":
        return
    if kind == "chunks":
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"" if kind == "empty" else b"body"})


def written(requests: bytes) -> Wire:
    async def run() -> Wire:
        wire = Wire()
        config = Config(app=app, log_level="critical")
        config.load()
        protocol = httptools_impl.HttpToolsProtocol(config, ServerState(), {}, asyncio.get_running_loop())
        protocol.connection_made(wire)
        protocol.data_received(requests)
        for _ in range(50):
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        return wire

    return asyncio.run(run())


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httptools_impl, "RequestResponseCycle", httptools_impl.RequestResponseCycle)


@pytest.mark.parametrize(
    ("request_line", "writes"),
    [
        ("POST /length", 1),
        ("GET /empty", 1),
        ("HEAD /length", 1),
        ("GET /chunks", 2),  # the first goes with the head
        ("GET /bad", 0),
        ("GET /raises", 1),  # uvicorn's own answer
        ("GET /short", 0),  # nothing of an answer that does not come
    ],
)
@pytest.mark.usefixtures("joined")
def test_the_head_goes_with_the_body(request_line: str, writes: int) -> None:
    one = f"{request_line} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n".encode()
    own = written(one)
    join_writes()
    ours = written(one)
    assert len(ours.writes) == writes
    assert ours.closed == own.closed
    if writes:
        dates = re.compile(rb"date: [^\r]+")
        assert dates.sub(b"", b"".join(ours.writes)) == dates.sub(b"", b"".join(own.writes))


@pytest.mark.usefixtures("joined")
def test_answers_to_requests_that_came_together_keep_their_order() -> None:
    join_writes()
    both = b"GET /empty HTTP/1.1\r\nhost: a\r\n\r\nGET /length HTTP/1.1\r\nhost: a\r\n\r\n"
    first, second = written(both).writes
    assert first.endswith(b"\r\n\r\n")
    assert second.endswith(b"body")
