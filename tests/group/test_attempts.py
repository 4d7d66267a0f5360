"""A layout that fails gives way to the next, busy cores are tried again, and nothing else has a second try.

Its ranks are fakes, with a classifier's phases and no model: milliseconds a test.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer.main
from click import Command, Context

from tests.group.conftest import INPUTS, PlainGroup
from tpray.artifacts.folder import Artifact
from tpray.commands.cli import app
from tpray.config import BatchConfig, ModelConfig, NeuronLayout, ParallelConfig
from tpray.errors import (
    ArtifactError,
    CompileError,
    ConfigError,
    GroupError,
    ParityError,
    PlacementError,
    RankError,
    StartTimeoutError,
    TprayError,
)
from tpray.group import attempts, wire
from tpray.group.attempts import TRIAL_S
from tpray.group.classifier import ClassifierGroup
from tpray.group.executor import Executor
from tpray.group.fake_executor import FakeExecutor
from tpray.group.jobs import Loaded
from tpray.group.lifecycle import State
from tpray.group.phases import PHASES, PhaseReport
from tpray.group.thread_executor import ThreadExecutor
from tpray.group.wire import Frame, Kind
from tpray.group.worker import ShardWorker
from tpray.platforms.busy import BUSY_LIMIT_S
from tpray.platforms.neuron import NEURON_XLA
from tpray.platforms.topology import Topology

pytestmark = pytest.mark.usefixtures("own_cache")

BUSY = "NRT:nrt_allocate_neuron_cores Logical Neuron Core(s) not available - Available:0 (cores busy, ret=-16)"
TWO_LAYOUTS = Topology(2, fallback="single-process")

Fault = Callable[["FaultyLayouts"], Awaitable[None]]


async def raise_error(executor: FaultyLayouts) -> None:
    raise RankError("a rank failed in its phase 'load': RuntimeError('nrt_load_collectives status=2')")


async def lose_a_rank(executor: FaultyLayouts) -> None:
    executor.die(1)
    await asyncio.sleep(30)


async def hang(executor: FaultyLayouts) -> None:
    await asyncio.sleep(30)


async def answer_wrongly(executor: FaultyLayouts) -> None:
    executor.answer(0, lambda frame: shifted(executor, frame))


async def never_answer(executor: FaultyLayouts) -> None:
    executor.hang(1)


async def raise_in_steps(executor: FaultyLayouts) -> None:
    for rank in range(2):
        executor.answer(rank, lambda frame: Frame(Kind.ERROR, frame.step, text="RuntimeError: nrt_execute status=5"))


def shifted(executor: FakeExecutor, frame: Frame) -> Frame | None:
    """The answer of one core too many in an all-reduce."""
    answered = executor._answer(0, frame)
    return answered and replace(answered, tensors=(answered.tensors[0] + np.float32(1),))


class FaultyLayouts(FakeExecutor):
    """Ranks that do not load their programs as they should in the layouts that ``faults`` names."""

    def __init__(self, topology: Topology = TWO_LAYOUTS, **faults: Fault) -> None:
        super().__init__(topology)
        self.faults = faults
        self.layouts: list[str] = []
        """The layout of each load."""

    async def load(self, artifact: Artifact) -> Loaded:
        self.layouts.append(self.topology.layout)
        loaded = await super().load(artifact)
        fault = self.faults.get(self.topology.layout.replace("-", "_"))
        if fault is not None:
            await fault(self)
        return loaded


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits and pauses that a test can wait for."""
    monkeypatch.setitem(TRIAL_S, "load", 0.2)
    monkeypatch.setattr(attempts, "PAUSE_S", 0.01)


def classifier(executor: Executor, seen: list[PhaseReport] | None = None) -> ClassifierGroup:
    progress = None if seen is None else seen.append
    group = ClassifierGroup(ModelConfig(dtype="float32"), executor, 0.5, progress)
    group._supervisor._pause_s = 0.01
    return group


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("fault", "phase", "words"),
    [
        (raise_error, "load", "nrt_load_collectives status=2"),
        (lose_a_rank, "load", "rank 1 died"),
        (hang, "load", "start-up phase 7 (load) did not finish within"),
        (answer_wrongly, "check", "differ"),
        (never_answer, "check", "not answered by rank 1"),
        (raise_in_steps, "check", "raised the same on every rank: RuntimeError: nrt_execute status=5"),
    ],
)
def test_a_layout_that_fails_gives_way_to_the_next(
    fault: Fault, phase: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, for the whole life of the group; what failed is said; and what was traced stays as it is."""

    async def main() -> None:
        executor, seen = FaultyLayouts(process_per_rank=fault), list[PhaseReport]()
        group = classifier(executor, seen)
        await group.start()
        try:
            assert executor.layouts == ["process-per-rank", "single-process"]
            assert group.layout_failure is not None
            assert group.layout_failure.startswith(f"process-per-rank failed in the phase {phase}: ")
            assert words in group.layout_failure
            (warning,) = [r.getMessage() for r in caplog.records if "failed in the phase" in r.getMessage()]
            assert warning == f"{group.layout_failure}; the group goes on with single-process " + (
                "(--neuron-layout single-process)"
            )
            (report,) = [report for report in seen if report.note == warning]
            assert (report.name, report.done) == (phase, True)
            assert report in group.phases
            again = executor.calls.index("kill")
            assert executor.calls[again : again + 5] == ["kill", "place", "spawn", "pin", "connect"]
            assert executor.calls.count("trace") == 1
            assert group.artifact.directory.exists()

            executor.die(0)
            await group.lifecycle.until(State.FAILED)
            await group.lifecycle.until_ready()
            assert executor.layouts == ["process-per-rank", "single-process", "single-process"]
            assert group.layout_failure
            await group.step(INPUTS)
        finally:
            await group.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())


@pytest.mark.usefixtures("short")
def test_a_runtime_that_does_not_start_counts_too() -> None:
    async def main() -> None:
        executor = FakeExecutor(TWO_LAYOUTS)
        executor.fail("connect", RankError("rank 0 cannot start the runtime"))
        group = PlainGroup(executor)
        await group.start()
        assert group.layout_failure == "process-per-rank failed in the phase connect: rank 0 cannot start the runtime"
        assert executor.topology.layout == "single-process"
        await group.stop()

    asyncio.run(main())


def test_real_ranks_load_in_the_next_layout_what_they_traced_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made anew with the other topology, and answer the canary."""
    load, loaded = ShardWorker.load, list[int]()

    def fail_alone(self: ShardWorker, artifact: Artifact) -> Loaded:
        if self.topology.layout == "process-per-rank":
            raise RuntimeError("nrt_load_collectives status=2")
        loaded.append(self.rank)
        return load(self, artifact)

    monkeypatch.setattr(ShardWorker, "load", fail_alone)

    async def main() -> None:
        group = classifier(ThreadExecutor(TWO_LAYOUTS))
        group.step_timeout_s = 30
        await group.start()
        assert group.layout_failure == "process-per-rank failed in the phase load: nrt_load_collectives status=2"
        assert sorted(loaded) == [0, 1]
        assert group.parity < 1e-4
        await group.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("short")
def test_nothing_of_an_attempt_waits_for_ranks_while_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a thread that waits on a descriptor finds another socket there."""
    waiting: list[wire.Listener] = []
    accept = wire.Listener.accept

    def watched(self: wire.Listener, ranks: int, fds: Sequence[int], timeout_s: float) -> list[socket.socket]:
        waiting.append(self)
        try:
            return accept(self, ranks, fds, timeout_s)
        finally:
            time.sleep(0.05)
            waiting.remove(self)

    class Watched(FakeExecutor):
        async def kill(self) -> None:
            assert not waiting
            await super().kill()

    monkeypatch.setattr(wire.Listener, "accept", watched)

    async def main() -> None:
        executor = Watched(TWO_LAYOUTS)
        executor.fail("connect", RankError("rank 0 cannot start the runtime"))
        group = PlainGroup(executor)
        await group.start()
        await group.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("fault", "kind"), [(raise_error, RankError), (hang, StartTimeoutError), (answer_wrongly, ParityError)]
)
def test_if_both_layouts_fail_both_failures_are_named(
    fault: Fault, kind: type[GroupError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is not on trial: phases have their own limits, and wrong answers cast doubt on the artifact."""
    monkeypatch.setitem(PHASES, "load", 0.4)

    async def main() -> None:
        executor = FaultyLayouts(process_per_rank=lose_a_rank, single_process=fault)
        group = classifier(executor)
        with pytest.raises(
            kind, match=r"^process-per-rank failed in the phase load: rank 1 died.*; single-process failed as well: "
        ):
            await group.start()
        assert executor.layouts == ["process-per-rank", "single-process"]
        assert executor.calls[-2:] == ["kill", "release"]
        assert group.artifact.directory.exists() == (fault is not answer_wrongly)

    asyncio.run(main())


@pytest.mark.usefixtures("short")
def test_a_layout_that_has_worked_is_not_given_up_in_a_restart() -> None:
    async def main() -> None:
        executor = FaultyLayouts()
        group = classifier(executor)
        await group.start()
        try:
            executor.fail("load", RankError("a passing fault"))
            executor.die(1)
            await group.lifecycle.until(State.FAILED)
            await group.lifecycle.until_ready()
            assert executor.layouts == ["process-per-rank"] * 3
            assert group.layout_failure is None
        finally:
            await group.stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("load", ConfigError("use --tp 2")),
        ("load_twice", ArtifactError("a file is damaged")),
        ("trace", CompileError("the compiler's words")),
        ("spawn", PlacementError("no room")),
        ("trace", RankError("a rank died in its phase 'trace'")),
    ],
)
def test_what_no_layout_mends_is_not_tried_in_another(call: str, error: TprayError) -> None:
    async def main() -> None:
        executor = FaultyLayouts()
        executor.fail(call.removesuffix("_twice"), error, times=2)  # a damaged artifact is traced again, once
        with pytest.raises(type(error), match=f"^{error}$"):
            await classifier(executor).start()
        assert set(executor.layouts) <= {"process-per-rank"}
        assert executor.topology.layout == "process-per-rank"

    asyncio.run(main())


def test_a_stop_ends_the_second_try_as_well() -> None:
    async def main() -> None:
        executor = FaultyLayouts(process_per_rank=raise_error, single_process=hang)
        group = classifier(executor)
        starting = asyncio.ensure_future(group.start())
        while len(executor.layouts) < 2:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(group.stop(), 2)
        with pytest.raises(GroupError, match=r"^the group was stopped$"):
            await starting
        assert executor.calls[-2:] == ["kill", "release"]

    asyncio.run(main())


def test_a_stop_between_two_tries_is_heeded() -> None:
    async def main() -> None:
        executor = FaultyLayouts(process_per_rank=raise_error)
        hold = executor.block("kill")
        group = classifier(executor)
        starting = asyncio.ensure_future(group.start())
        while "kill" not in executor.calls:
            await asyncio.sleep(0.001)
        stopping = asyncio.ensure_future(group.stop())
        await asyncio.sleep(0.01)
        hold.set()
        with pytest.raises(GroupError, match=r"^the group was stopped$"):
            await starting
        await stopping
        assert executor.calls.count("spawn") == 1

    asyncio.run(main())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("runtime", ["neuron", "neuron-xla"])
def test_busy_cores_are_tried_again_by_new_processes(runtime: str) -> None:
    """In the same layout, on both stacks."""

    async def main() -> None:
        executor = FakeExecutor(Topology.of(ParallelConfig(tp=2, runtime=runtime, instance_family="trn2")))
        executor.fail("connect", RankError(f"rank 1 cannot start: {BUSY}"), times=3)
        group = PlainGroup(executor)
        await group.start()
        assert executor.calls.count("spawn") == 4
        assert executor.topology.layout == "process-per-rank"
        assert group.layout_failure is None
        assert [p.note.partition(":")[0] for p in group.phases if p.name == "connect"] == [
            *["the NeuronCores are busy, and are tried again"] * 3,
            "",
        ]
        await group.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("short")
def test_cores_that_stay_busy_end_the_start_or_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes one core of a device may be what keeps the next one from it."""
    monkeypatch.setattr(NEURON_XLA, "busy_limit_s", 0.1)

    async def main(layout: NeuronLayout) -> FakeExecutor:
        parallel = ParallelConfig(tp=2, runtime="neuron-xla", instance_family="inf2", neuron_layout=layout)
        executor = FakeExecutor(Topology.of(parallel))
        executor.fail("connect", RankError(BUSY), times=1000)
        with pytest.raises(RankError, match="ret=-16"):
            await asyncio.wait_for(PlainGroup(executor).start(), 5)
        return executor

    assert asyncio.run(main("process-per-rank")).topology.layout == "process-per-rank"
    executor = asyncio.run(main("auto"))
    assert executor.topology.layout == "single-process"
    assert executor.calls.count("spawn") > 3


def test_no_limit_of_a_trial_is_longer_than_its_phase_or_shorter_than_busy_cores_may_take() -> None:
    for phase, limit_s in TRIAL_S.items():
        assert 2 * BUSY_LIMIT_S < limit_s < PHASES[phase]


@pytest.mark.parametrize(
    ("runtime", "tp", "asked", "layout", "fallback"),
    [
        ("neuron-xla", 2, "auto", "process-per-rank", "single-process"),
        ("neuron-xla", 1, "auto", "process-per-rank", None),
        ("neuron-xla", 2, "process-per-rank", "process-per-rank", None),
        ("neuron-xla", 2, "single-process", "single-process", None),
        ("neuron", 2, "auto", "process-per-rank", None),
        ("cpu", 2, "auto", "process-per-rank", None),
        ("cpu", 2, "single-process", "process-per-rank", None),
    ],
)
def test_what_auto_means_on_each_kind_of_core(
    runtime: str, tp: int, asked: NeuronLayout, layout: str, fallback: str | None
) -> None:
    parallel = ParallelConfig(tp=tp, runtime=runtime, instance_family="trn2", neuron_layout=asked)
    topology = Topology.of(parallel)
    assert (topology.layout, topology.fallback) == (layout, fallback)
    if asked == "auto":
        assert Topology.of(ParallelConfig(tp=tp, runtime=runtime, instance_family="trn2")) == topology


def test_both_layouts_need_the_same_of_ray() -> None:
    first = Topology(8, "neuron-xla", fallback="single-process")
    second = replace(first, layout="single-process", fallback=None)
    assert first.resources() == second.resources()
    assert first.compiled_for == second.compiled_for
    assert [len(first.processes), len(second.processes)] == [8, 1]


def test_the_help_and_the_readme_state_the_limits() -> None:
    serve = typer.main.get_command(app).get_command(Context(Command("tpray")), "serve")  # type: ignore[attr-defined]
    help_ = next(option.help for option in serve.params if option.name == "neuron_layout")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for told in (help_, readme):
        words = " ".join(told.split())
        assert f"{TRIAL_S['load']:.0f} s" in words
        assert f"{BatchConfig().step_timeout_s:.0f} s" in words
    assert f"for up to {BUSY_LIMIT_S:.0f} s" in " ".join(readme.split())
