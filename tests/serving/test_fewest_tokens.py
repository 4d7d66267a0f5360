"""Which group a handle's request goes to; Serve itself is in `tests.bench.scale`, which measured it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tpray.serving.fewest_tokens import FewestTokens
from tpray.serving.model_router import Asked


def router() -> FewestTokens:
    made = FewestTokens.__new__(FewestTokens)  # Serve's own constructor wants a running deployment
    made.initialize_state()
    return made


def best(of: FewestTokens, *names: str) -> str:
    groups: list[Any] = [SimpleNamespace(replica_id=name) for name in names]
    ranked = asyncio.run(of.choose_replicas(groups))
    assert sorted(group.replica_id for (group,) in ranked) == sorted(names), "all, one after the other"
    return str(ranked[0][0].replica_id)


def send(of: FewestTokens, group: Any, number: str, *sent: Any) -> None:
    request: Any = SimpleNamespace(args=list(sent), metadata=SimpleNamespace(internal_request_id=number))
    of.on_request_routed(request, group, None)


def test_a_long_text_counts_more_than_several_short_ones() -> None:
    of = router()
    send(of, "a", "1", "word " * 400)
    for number in range(3):
        send(of, "b", f"b{number}", ["a short text", "and another"])
    assert best(of, "a", "b") == "b"
    of.on_request_completed("a", "1")  # type: ignore[arg-type]
    assert best(of, "a", "b") == "a"


def test_what_was_answered_and_what_is_not_known_counts_nothing() -> None:
    of = router()
    send(of, "a", "1")
    of.on_request_completed("a", "1")  # type: ignore[arg-type]
    of.on_request_completed("a", "of somebody else")  # type: ignore[arg-type]
    assert {best(of, "a", "b") for _ in range(50)} == {"a", "b"}, "of equals any"


def test_a_request_that_is_passed_on_counts_by_its_body() -> None:
    of = router()
    send(of, "a", "1", Asked("POST", "/predict", b"", [], b"x" * 4000))
    send(of, "b", "2", Asked("POST", "/predict", b"", [(b"a-header", b"x" * 8000)], b"x" * 400))
    assert best(of, "a", "b") == "b"
