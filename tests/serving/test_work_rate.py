"""How fast a queue empties: what is measured, and when it is trusted."""

from __future__ import annotations

import pytest

from tpray.serving.work_rate import MEMORY_S, WorkRate


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(rate: WorkRate, clock: Clock, steps: int, seconds: float, tokens: int, full: bool = True) -> None:
    for _ in range(steps):
        clock.now += seconds
        rate.add(tokens, full)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rate(clock: Clock) -> WorkRate:
    rate = WorkRate(clock)
    rate.begin()
    return rate


def test_the_rate_is_that_of_full_steps_and_not_known_before_there_were_some(rate: WorkRate, clock: Clock) -> None:
    work(rate, clock, 100, 0.01, tokens=4, full=False)
    assert rate.tokens_per_s == 0
    assert rate.seconds_for(10_000) == 0
    work(rate, clock, 4, 0.1, tokens=500)
    assert rate.tokens_per_s == 0, "the first steps are slow"
    work(rate, clock, 4, 0.1, tokens=500)
    assert rate.tokens_per_s == pytest.approx(5000)
    assert rate.seconds_for(10_000) == pytest.approx(2)


def test_steps_that_end_together_share_their_time(rate: WorkRate, clock: Clock) -> None:
    for _ in range(20):
        clock.now += 0.1
        rate.add(500, full=True)
        rate.add(500, full=True)
    assert rate.tokens_per_s == pytest.approx(10_000)


def test_time_without_work_does_not_count(rate: WorkRate, clock: Clock) -> None:
    for _ in range(10):
        clock.now += 0.3
        rate.begin()
        work(rate, clock, 1, 0.1, tokens=500)
    assert rate.tokens_per_s == pytest.approx(5000)


def test_the_rate_follows_a_change_and_is_forgotten_in_time(rate: WorkRate, clock: Clock) -> None:
    work(rate, clock, 100, 0.1, tokens=500)
    work(rate, clock, round(3 * MEMORY_S / 0.1), 0.1, tokens=100)
    assert 1000 < rate.tokens_per_s < 1300
    clock.now += MEMORY_S + 1
    assert rate.tokens_per_s == 0
    rate.begin()
    work(rate, clock, 50, 0.1, tokens=900)
    assert rate.tokens_per_s == pytest.approx(9000, rel=0.2)


def test_a_stall_is_got_over(rate: WorkRate, clock: Clock) -> None:
    """The machine stood still for a while: for `MEMORY_S` after it too little is let in, and no longer."""
    work(rate, clock, 100, 0.1, tokens=500)
    work(rate, clock, 1, 30, tokens=500)
    assert rate.tokens_per_s < 100
    work(rate, clock, 60, 0.1, tokens=200, full=False)  # so few were let in that no step is full
    assert rate.tokens_per_s == 0
    work(rate, clock, 200, 0.1, tokens=500)
    assert rate.tokens_per_s > 4000
