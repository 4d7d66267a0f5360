"""What is remembered of rows that were under way when their group failed."""

from __future__ import annotations

from tpray.serving import suspects
from tpray.serving.suspects import EXPIRY_S, Suspects
from tpray.tokenizer import Encoded


def row(*ids: int) -> Encoded:
    return Encoded(list(ids), [0] * len(ids))


def test_a_row_is_refused_after_two_failures_with_it_alone() -> None:
    known = Suspects()
    for alone, refused in ((False, False), (False, False), (True, False), (False, False), (True, True)):
        known.add(row(1, 2), alone)
        assert row(1, 2) in known
        assert known.refuses(row(1, 2)) is refused
    assert row(1, 3) not in known
    assert Encoded([1, 2], [0, 1]) not in known, "other token types make another row"


def test_an_answer_clears_a_row() -> None:
    known = Suspects()
    known.add(row(1), alone=True)
    known.clear(row(1))
    known.clear(row(2))  # not known: nothing happens
    assert row(1) not in known
    known.add(row(1), alone=True)
    assert not known.refuses(row(1))


def test_rows_are_forgotten_in_time() -> None:
    now = 0.0
    known = Suspects(lambda: now)
    known.add(row(1), alone=True)
    now = EXPIRY_S - 1
    known.add(row(1), alone=True)
    now += EXPIRY_S - 1
    assert known.refuses(row(1))
    now += 1
    assert row(1) not in known
    known.add(row(1), alone=True)
    assert not known.refuses(row(1)), "what was forgotten does not count"


def test_few_are_remembered() -> None:
    known = Suspects()
    for i in range(suspects.REMEMBERED + 1):
        known.add(row(i), alone=False)
        known.add(row(1), alone=False)
    assert row(0) not in known
    assert row(1) in known
    assert len(known._known) == suspects.REMEMBERED
