"""The limits of steps, by what steps took."""

from __future__ import annotations

import pytest

from tpray.group.pace import FLOOR_S, GRACE_S, MEASURED, Limits, Pace


def paced(*steps: tuple[int, float]) -> Pace:
    pace = Pace()
    for size, seconds in steps:
        pace.measure(size, seconds)
    return pace


def test_until_enough_was_measured_there_is_only_the_ceiling() -> None:
    pace = paced(*[(512, 0.01)] * (MEASURED - 1))
    assert pace.limits(512, 60.0) == Limits(60.0, FLOOR_S)
    pace.measure(512, 0.01)
    assert pace.limits(512, 60.0) == Limits(FLOOR_S, GRACE_S)


@pytest.mark.parametrize(
    ("size", "expected_s"), [(1, 0.1), (9, 1.0), (257, 1.0), (512, 1.0), (513, 4.0), (1024, 4.0), (1025, None)]
)
def test_a_step_takes_at_most_what_its_class_or_the_next_larger_took(size: int, expected_s: float | None) -> None:
    assert paced(*[(8, 0.1)] * 8, (300, 1.0), (1024, 4.0)).expected_s(size) == expected_s


def test_limits_are_generous_and_never_above_the_ceiling() -> None:
    pace = paced(*[(512, 1.0)] * MEASURED)
    assert pace.limits(512, 60.0) == Limits(20.0, 4.0)
    assert pace.limits(512, 10.0) == Limits(10.0, 4.0)
    assert pace.limits(512, 2.0) == Limits(2.0, 2.0)
    assert pace.limits(9999, 60.0).answer_s == 60.0, "larger than anything that was measured"
    assert pace.limits(None, 60.0).answer_s == 60.0


def test_one_slow_step_is_remembered_for_a_while() -> None:
    pace = paced(*[(512, 1.0)] * MEASURED, (512, 2.9))
    assert pace.limits(512, 99.0).answer_s == pytest.approx(58.0)
    for _ in range(100):
        pace.measure(512, 1.0)
    assert pace.limits(512, 99.0).answer_s == pytest.approx(20.0, rel=0.01)
