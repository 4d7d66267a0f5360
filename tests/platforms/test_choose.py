"""The choice of a degree and a number of groups: pure, so every case is tried."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpray.config import Goal
from tpray.errors import ConfigError, DegreeError
from tpray.platforms.choose import (
    CLEARLY,
    MOST_RANKS,
    Asked,
    Layout,
    MachineFacts,
    ModelFacts,
    candidates,
    check_memory,
    choose,
    choose_cores,
    memory_of,
    warn_of_cores,
)

GIB = 1 << 30
BERT = ModelFacts("bert", 440 << 20, "float32", 768, 3072, 12, 12)
GOALS: tuple[Goal, ...] = ("latency", "throughput")


def facts(cores: int, available: int = 64 * GIB) -> MachineFacts:
    return MachineFacts(cores, available)


maybe = st.none() | st.integers(1, 9)
machines = st.builds(facts, st.integers(1, 96), st.integers(1, 200).map(lambda n: n * GIB // 2))
models = st.builds(
    ModelFacts, st.just("m"), st.integers(1, 40 * GIB), st.just("float32"), st.just(768), st.just(3072),
    st.integers(1, 40), st.just(12),
)  # fmt: skip
asked_things = st.builds(Asked, maybe, maybe, maybe)


@given(models, machines, st.sampled_from(GOALS), asked_things, st.randoms(use_true_random=False))
def test_what_is_asked_wins_and_the_fastest_that_fits_is_taken(
    model: ModelFacts, machine: MachineFacts, goal: Goal, asked: Asked, random: object
) -> None:
    layouts = candidates(model, machine, goal, asked)
    figures = {layout: random.uniform(0.001, 1) for layout in layouts}  # type: ignore[attr-defined]
    choice = choose(model, machine, goal, asked, figures)
    layout = choice.layout
    assert layout in layouts
    for name in ("tp", "replicas", "cores_per_rank"):
        said = getattr(asked, name)
        assert said is None or getattr(layout, name) == said
    if asked.tp is None:
        assert layout.tp <= min(model.heads, max(MOST_RANKS, 1))
    if len(layouts) > 1:  # those that fit; where none does, one is left, and refused later
        assert all(one.cores <= machine.cores for one in layouts)
        assert all(memory_of(model, one) <= machine.available_bytes for one in layouts)
        cost = {one: figures[one] / (one.replicas if goal == "throughput" else 1) for one in layouts}
        assert cost[layout] * CLEARLY ** len(layouts) <= min(cost.values())
    assert str(layout) in choice.reason


@given(models, machines, st.sampled_from(GOALS))
def test_for_latency_there_is_one_group(model: ModelFacts, machine: MachineFacts, goal: Goal) -> None:
    layouts = candidates(model, machine, "latency", Asked())
    assert {layout.replicas for layout in layouts} == {1}


def test_two_cores_are_two_groups_for_throughput_when_they_are_faster() -> None:
    one, two, both = Layout(1, 1, 2), Layout(2, 1, 1), Layout(1, 2, 1)
    assert candidates(BERT, facts(2), "throughput", Asked()) == [one, both, two]
    choice = choose(BERT, facts(2), "throughput", Asked(), {one: 0.22, two: 0.40, both: 0.23})
    assert choice.layout == two
    assert "5 steps a second" in choice.reason
    assert "4.55 with tp 1 on 2 cores" in choice.reason


def test_groups_that_are_hardly_slower_are_taken_for_throughput() -> None:
    one, two, both = Layout(1, 1, 2), Layout(2, 1, 1), Layout(1, 2, 1)
    assert choose(BERT, facts(2), "throughput", Asked(), {one: 0.22, two: 0.45, both: 0.23}).layout == two
    assert choose(BERT, facts(2), "throughput", Asked(), {one: 0.22, two: 0.50, both: 0.23}).layout == one


def test_a_degree_that_is_hardly_faster_is_not_taken() -> None:
    one, both = Layout(1, 1, 2), Layout(1, 2, 1)
    assert choose(BERT, facts(2), "latency", Asked(), {one: 0.031, both: 0.030}).layout == one
    assert choose(BERT, facts(2), "latency", Asked(), {one: 0.031, both: 0.025}).layout == both


@pytest.mark.parametrize(("goal", "expected"), [("latency", Layout(1, 1, 2)), ("throughput", Layout(2, 1, 1))])
def test_a_machine_that_is_too_busy_to_measure_gets_what_wins_as_a_rule(goal: Goal, expected: Layout) -> None:
    choice = choose(BERT, facts(2), goal, Asked(), {})
    assert choice.layout == expected
    assert "too busy to measure" in choice.reason


def test_groups_that_do_not_fit_the_memory_are_not_chosen() -> None:
    tight = facts(2, int(1.5 * memory_of(BERT, Layout(1, 1, 1))))
    layouts = candidates(BERT, tight, "throughput", Asked(tp=1))
    assert layouts == [Layout(1, 1, 2)]
    reason = choose(BERT, tight, "throughput", Asked(tp=1), {}).reason
    assert (
        reason == "tp 1 on 2 cores: 2 groups of tp 1 on 1 core would take 2.7 GiB of memory, and 2.1 GiB are available"
    )


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize(
    ("cores", "available", "asked", "reason"),
    [
        (8, GIB, Asked(), "it comes nearest to the memory: it takes 1.4 GiB of memory, and 1.0 GiB are available"),
        (1, GIB, Asked(), "it comes nearest to the memory: it takes 1.4 GiB of memory, and 1.0 GiB are available"),
        (2, GIB, Asked(tp=4), "as was asked, though it wants 4 CPU cores and 2 can be used"),
        (1, 64 * GIB, Asked(), "one core can be used here"),
    ],
)
def test_what_does_not_fit_is_not_said_to_fit(
    cores: int, available: int, asked: Asked, reason: str, goal: Goal
) -> None:
    choice = choose(BERT, facts(cores, available), goal, asked, {})
    assert choice.reason == f"{choice.layout}: {reason}"


def test_a_degree_that_does_not_fit_the_memory_is_the_reason() -> None:
    tight = facts(2, int(1.1 * memory_of(BERT, Layout(1, 1, 1))))
    reason = choose(BERT, tight, "latency", Asked(), {}).reason
    assert reason == "tp 1 on 2 cores: tp 2 on 1 core each would take 1.8 GiB of memory, and 1.5 GiB are available"
    assert choose(BERT, facts(2), "latency", Asked(tp=2), {}).reason.endswith(
        "the only layout on 2 cores that fits what was asked"
    )


def test_groups_that_are_asked_for_and_do_not_fit_are_refused_with_both_figures() -> None:
    group = memory_of(BERT, Layout(1, 1, 1))
    with pytest.raises(ConfigError, match=r"4 groups of bert take .* GiB.* available: use --replicas 2, or"):
        check_memory(BERT, facts(4, int(2.5 * group)), Layout(4, 1, 1))
    check_memory(BERT, facts(4, 5 * group), Layout(4, 1, 1))


def test_more_ranks_than_cores_are_told_what_would_do() -> None:
    said = warn_of_cores(2, Layout(1, 4, 1), "latency")
    assert "4 ranks want 4 CPU cores and 2 can be used here" in said
    assert "--tp 2 --replicas 1" in said
    with pytest.raises(DegreeError, match="for throughput use --tp 1 --replicas 2"):
        warn_of_cores(2, Layout(3, 1, 1), "throughput")
    with pytest.raises(DegreeError, match="--tp 2 --replicas 2 --cores-per-rank 1"):
        warn_of_cores(4, Layout(2, 2, 4), "throughput")


def test_a_traced_model_is_told_to_be_traced_again_for_another_degree() -> None:
    said = warn_of_cores(2, Layout(1, 4, 1), "latency", traced=True)
    assert said.endswith("to be faster, trace the model again with --tp 2, and use --replicas 1")
    with pytest.raises(DegreeError, match=r"throughput trace the model again with --tp 2, and use --replicas 1$"):
        warn_of_cores(2, Layout(3, 4, 1), "throughput", traced=True)
    with pytest.raises(DegreeError, match="for throughput use --replicas 2, or leave these flags out"):
        warn_of_cores(4, Layout(3, 2, 1), "throughput", traced=True)
    said = warn_of_cores(4, Layout(1, 2, 4), "latency", traced=True)
    assert said.endswith("to be faster, use --replicas 1 --cores-per-rank 2")


@pytest.mark.parametrize(("size", "cores", "goal"), list(product((1, 20, 40), (2, 8), GOALS)))
def test_neuron_takes_the_smallest_degree_whose_weights_fit(size: int, cores: int, goal: Goal) -> None:
    model = ModelFacts("large", size * GIB, "bfloat16", 4096, 16384, 32, 32)
    machine = MachineFacts(cores, 64 * GIB, core_bytes=16 * GIB, degrees=(1, 2, 4, 8))
    smallest = {1: 1, 20: 2, 40: 4}[size]
    if smallest > cores:
        with pytest.raises(DegreeError, match=r"40\.0 GiB in bfloat16.* hold 32\.0 GiB"):
            choose_cores(model, machine, goal, Asked())
        return
    layout = choose_cores(model, machine, goal, Asked()).layout
    assert layout == Layout(cores // smallest if goal == "throughput" else 1, smallest, 1)


def test_neuron_whose_family_is_not_known_takes_one_core() -> None:
    assert choose_cores(BERT, MachineFacts(0, GIB), "throughput", Asked()).layout == Layout(1, 1, 1)
