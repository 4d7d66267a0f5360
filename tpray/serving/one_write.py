"""An HTTP answer leaves a replica in one write: its head and its body.

uvicorn writes the head as soon as it has it, which costs a system call of its own here and another in HAProxy; and when
the replica is killed between the two, a client is left with half an answer that nobody can take back.

Source: uvicorn/protocols/http/httptools_impl.py of uvicorn 0.54, whose class is replaced where it is looked up.
"""

from __future__ import annotations

from typing import Any, cast

from uvicorn.protocols.http import httptools_impl


class _JoinedWrites:
    """A transport whose first two writes are one."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""  # it has gone; what follows goes as it comes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class JoinedCycle(httptools_impl.RequestResponseCycle):
    """A request and its answer, whose head waits for the first part of its body."""

    async def send(self, message: Any) -> None:
        begins = message["type"] == "http.response.start" and not isinstance(self.transport, _JoinedWrites)
        if begins and self.scope["method"] != "HEAD":  # which has no body to wait for
            self.transport = cast(Any, _JoinedWrites(self.transport))
        await super().send(message)


def join_writes() -> None:
    """Have this process's uvicorn answer so from now on."""
    httptools_impl.RequestResponseCycle = JoinedCycle  # type: ignore[misc]  # a checker takes a class for a constant
