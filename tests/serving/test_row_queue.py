"""Whose turn it is, long rows' or short ones': nobody starves, nothing waits in vain, and there are no convoys."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from tpray.serving.row_queue import ABOUT_S, SHORT_SHARE, Lane, RowQueue
from tpray.serving.row_queue import STEP_TOKENS as LEAST

LONG_TOKENS, STEP_TOKENS, SLOTS = 128, 512, 2
TOKENS_PER_S = 2000.0


@dataclass(eq=False)
class Row:
    length: int
    arrived: float
    suspected: bool = False
    left: bool = False
    started: float = 0.0
    ended: float = 0.0

    def __len__(self) -> int:
        return self.length

    @property
    def is_long(self) -> bool:
        return self.length > LONG_TOKENS


@dataclass
class Took:
    """A step: when it was taken and ends, what of, and what waited beside it."""

    at: float
    ends: float
    kind: Lane
    rows: list[Row]
    waiting: list[Row]


def served(rows: list[Row]) -> list[Took]:
    """Serve rows, in the order of their arrival, by ranks that compute one step at a time, `SLOTS` in flight."""
    now = 0.0
    queue: RowQueue[Row] = RowQueue(lambda row: not row.left, LONG_TOKENS, lambda: now)
    steps, running, free_at = list[Took](), list[Took](), 0.0
    coming = rows[::-1]
    while coming or queue or running:
        now = min([step.ends for step in running] + ([coming[-1].arrived] if coming else []))
        running = [step for step in running if step.ends > now]
        while coming and coming[-1].arrived <= now:
            queue.extend([coming.pop()])
        while len(running) < SLOTS:
            kind = queue.turn(bool(running), any(step.kind is Lane.LONG for step in running))
            if kind is None:
                assert running or not any(not row.left for row in queue), "the ranks wait in vain"
                break
            taken = queue.take(kind, STEP_TOKENS)
            free_at = max(free_at, now) + sum(map(len, taken)) / TOKENS_PER_S
            for row in taken:
                row.started, row.ended = now, free_at
            running.append(Took(now, free_at, kind, taken, [row for row in queue if not row.left]))
            steps.append(running[-1])
            assert queue.tokens == sum(map(len, queue))
            if kind is Lane.SUSPECT:
                break
    return steps


def arrivals(seed: int, share_long: float, load: float, count: int = 400) -> list[Row]:
    """Rows at random, at ``load`` of what the ranks can compute."""
    rng, at, rows = random.Random(seed), 0.0, []
    for _ in range(count):
        length = rng.randint(200, 512) if rng.random() < share_long else rng.randint(8, 32)
        at += rng.expovariate(load * TOKENS_PER_S / length)
        rows.append(Row(length, at, left=rng.random() < 0.05))
    return rows


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("share_long", "load"), [(0.0, 2.0), (0.05, 0.5), (0.05, 3.0), (0.3, 1.5), (1.0, 2.0)])
def test_every_row_is_taken_once_in_the_order_of_its_kind_within_the_budget(
    seed: int, share_long: float, load: float
) -> None:
    rows = arrivals(seed, share_long, load)
    steps = served(rows)
    for long in (False, True):
        taken = [row for step in steps for row in step.rows if row.is_long is long]
        assert taken == [row for row in rows if row.is_long is long and not row.left]
    assert all(len(step.rows) == 1 or sum(map(len, step.rows)) <= STEP_TOKENS for step in steps)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("load", [0.7, 1.5, 4.0])
def test_neither_kind_takes_more_than_its_share_while_the_other_waits(seed: int, load: float) -> None:
    steps = served(arrivals(seed, 0.1, load))
    for before, step in pairwise(steps):  # of long rows: never two in succession while a short one waits
        if before.kind is step.kind is Lane.LONG:
            assert not any(not row.is_long and row.arrived <= before.at for row in step.waiting)
    for long in (row for step in steps for row in step.rows if row.is_long):
        # What goes before a long row once it is the oldest of its kind: what is owed to short ones for the one before
        # it, a step that goes over that, and short ones that are older.
        first = max([long.arrived, *(o.started for o in taken_before(steps, long))])
        younger = [r for s in steps if first < s.at <= long.started and s.kind is Lane.SHORT for r in s.rows]
        assert sum(len(r) for r in younger if r.arrived > long.arrived) <= SHORT_SHARE * 512 + STEP_TOKENS


def taken_before(steps: list[Took], long: Row) -> list[Row]:
    return [row for step in steps for row in step.rows if row.is_long and row.arrived < long.arrived]


@pytest.mark.parametrize("seed", range(20))
def test_a_short_row_waits_for_one_long_row_at_most(seed: int) -> None:
    """At a moderate load of short rows, while long ones always wait: there were convoys of them in one queue."""
    rng = random.Random(seed)
    short = [Row(16, 0.05 * i + rng.random() * 0.05) for i in range(200)]  # a sixth of what the ranks can compute
    long = [Row(512, 0.2 * i) for i in range(50)]  # more than they can
    steps = served(sorted([*short, *long], key=lambda row: row.arrived))
    for row in short:
        behind = [s for s in steps if s.kind is Lane.LONG and row.arrived < s.ends and s.at < row.started]
        assert len(behind) <= 1
        assert row.ended - row.arrived <= (512 + 16 * 20) / TOKENS_PER_S


def test_a_step_of_few_tokens_counts_as_what_it_costs() -> None:
    """Rows of 8 tokens went a thousand at a time, twelve seconds, between two rows of 4,000 tokens of three seconds."""
    queue: RowQueue[Row] = RowQueue(lambda row: not row.left, LONG_TOKENS, lambda: 0.0)
    queue.extend([Row(4000, 0.0), Row(4000, 0.1)])
    assert len(queue.take(Lane.LONG, STEP_TOKENS)) == 1
    steps = 0
    queue.extend([Row(8, 1.0)])
    while queue.turn(False, False) is Lane.SHORT:
        queue.take(Lane.SHORT, STEP_TOKENS)
        queue.extend([Row(8, 1.0)])
        steps += 1
    assert steps == SHORT_SHARE * 4000 // LEAST


def test_long_rows_by_themselves_go_together_and_two_steps_ahead() -> None:
    now = 0.0
    queue: RowQueue[Row] = RowQueue(lambda row: not row.left, LONG_TOKENS, lambda: now)
    queue.extend([Row(16, 0.0)])
    assert queue.turn(False, False) is Lane.SHORT
    queue.take(Lane.SHORT, STEP_TOKENS)
    queue.extend([Row(200, 0.1), Row(300, 0.2), Row(400, 0.3)])
    assert [len(row) for row in queue.take(Lane.LONG, STEP_TOKENS)] == [200]
    assert queue.turn(True, True) is None, "a short row may come"
    now = ABOUT_S
    assert queue.turn(True, True) is Lane.LONG
    assert [len(row) for row in queue.take(Lane.LONG, STEP_TOKENS)] == [300]
    assert [len(row) for row in queue.take(Lane.LONG, STEP_TOKENS)] == [400]
    queue.extend([Row(200, 1.0), Row(300, 1.0)])
    assert [len(row) for row in queue.take(Lane.LONG, STEP_TOKENS)] == [200, 300]


def test_a_suspect_goes_when_it_is_the_oldest_and_nothing_is_under_way() -> None:
    queue: RowQueue[Row] = RowQueue(lambda row: not row.left, LONG_TOKENS)
    queue.extend([Row(16, 1.0), Row(16, 2.0, suspected=True), Row(512, 3.0)])
    assert queue.turn(True, False) is Lane.SHORT
    queue.take(Lane.SHORT, STEP_TOKENS)
    assert queue.turn(True, False) is None
    assert queue.turn(False, False) is Lane.SUSPECT
    queue.put_back([Row(16, 1.5)])
    assert queue.turn(False, False) is Lane.SHORT
    assert queue.tokens == 16 + 16 + 512
