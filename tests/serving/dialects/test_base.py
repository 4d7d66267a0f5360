"""What all dialects share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tpray.errors import OverloadedError, PayloadTooLargeError
from tpray.serving.dialects.base import BODIES_AT_ONCE, SMALL_BODY_BYTES, Bodies, Rendered, send_answer


@pytest.mark.parametrize("size", [1, SMALL_BODY_BYTES, SMALL_BODY_BYTES + 1, 100_000])
def test_bodies_are_bounded_one_by_one_and_together_and_small_ones_always_come_in(size: int) -> None:
    bodies, held = Bodies(), []
    limit = 100_000
    for _ in range(1000):
        holding = bodies.holding(size, limit)
        try:
            holding.__enter__()
        except OverloadedError:
            break
        held.append(holding)
    together = len(held) * max(0, size - SMALL_BODY_BYTES)
    assert bodies.held_bytes == together <= BODIES_AT_ONCE * limit
    assert (len(held) == 1000) == (size <= SMALL_BODY_BYTES + 1)
    for holding in held:
        holding.__exit__(None, None, None)
    assert bodies.held_bytes == 0
    with pytest.raises(PayloadTooLargeError, match="larger than 100000 bytes"), bodies.holding(limit + 1, limit):
        raise AssertionError("it is too large")
    assert bodies.held_bytes == 0


@pytest.mark.parametrize(
    ("headers", "kind"), [({}, b"application/json"), ({"content-type": "text/html"}, b"text/html")]
)
def test_an_answer_says_once_of_what_kind_it_is(headers: dict[str, str], kind: bytes) -> None:
    """Binary tensors were both JSON and not."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(send_answer(Rendered(200, b"{}", headers), send))
    assert [value for name, value in sent[0]["headers"] if name == b"content-type"] == [kind]
