"""How much memory and how many cores a control group leaves: one answer, whoever asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpray.artifacts import sizes
from tpray.artifacts.resolve import find_model
from tpray.commands import machine_checks
from tpray.config import ModelConfig, ParallelConfig
from tpray.errors import ConfigError
from tpray.group.worker import ShardWorker
from tpray.platforms import cores
from tpray.platforms import memory as memories
from tpray.platforms.cpu import CpuPlatform
from tpray.platforms.memory import Memory, core_limit, memory
from tpray.platforms.topology import Topology


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
    return path


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, None, Memory(8 << 30, 16 << 30)),
        ("max", "1", Memory(8 << 30, 16 << 30)),
        (str(4 << 30), str(3 << 30), Memory(3 << 30, 4 << 30, limited=True)),  # two of it are pages of files
        (str(4 << 30), str(2 << 30), Memory(4 << 30, 4 << 30, limited=True)),
        (str(64 << 30), str(1 << 30), Memory(8 << 30, 16 << 30)),
    ],
)
def test_a_control_group_may_limit_it(
    limit: str | None, used: str | None, expected: Memory, meminfo: Path, tmp_path: Path
) -> None:
    for name, value in (("max", limit), ("current", used)):
        if value is not None:
            (tmp_path / f"memory.{name}").write_text(value)
    stat = {"file": 5 << 29, "shmem": 1 << 29, "inactive_file": 3 << 29, "active_file": 1 << 29}
    (tmp_path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
    assert memory(meminfo, tmp_path) == expected


def test_serve_and_doctor_look_at_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Memory(1 << 20, 1 << 30, limited=True)
    monkeypatch.setattr(memories, "memory", lambda: small)
    monkeypatch.setattr(machine_checks, "memory", memories.memory)
    assert vars(sizes)["available_bytes"] is memories.available_bytes
    with pytest.raises(ConfigError, match=r"GiB and this machine has 0\.0 GiB"):
        find_model(ModelConfig(), Topology(1))
    assert machine_checks._memory().value.startswith("0.0 of 1.0 GiB (a control group's limit) available")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [(None, None), ("max 100000", None), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1)],
)
def test_a_control_group_may_limit_the_cores(quota: str | None, expected: int | None, tmp_path: Path) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert core_limit(tmp_path) == expected


def test_threads_and_layouts_keep_to_that_limit_and_doctor_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids stay what ranks may be pinned to."""
    monkeypatch.setattr(cores, "usable_cores", lambda: list(range(64)))
    monkeypatch.setattr(cores, "core_limit", lambda: 2)
    assert CpuPlatform().facts(ParallelConfig()).cores == 2
    assert [Topology.of(ParallelConfig(tp=tp)).threads for tp in (1, 2, 4)] == [2, 1, 1]
    monkeypatch.setattr(cores, "core_limit", lambda: None)
    assert CpuPlatform().facts(ParallelConfig()).cores == 64
    monkeypatch.setattr(machine_checks, "core_limit", lambda: 2)
    assert "the time of 2 of them (a control group's limit)" in machine_checks._cores().value


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there are no cores that a control group could keep back")
def test_under_that_limit_ranks_are_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other containers see the same cores, and not this one's leases: each would pin itself to the first."""
    monkeypatch.setattr(cores, "core_limit", lambda: 1)
    rank = ShardWorker(0, Topology(1, cores_per_rank=1))
    before = os.sched_getaffinity(0)
    assert rank.pin() == ()
    assert os.sched_getaffinity(0) == before
    rank.end()


def test_a_rank_that_waits_for_work_does_not_collect_what_it_has_imported() -> None:
    """A full collection looks at every object, and there are some 400,000 of them before there is a model."""
    code = (
        "import gc\nfrom tpray.group.worker_host import WorkerHost\nhost = WorkerHost()\n"
        "host.preload(1)\npreloaded = gc.get_freeze_count()\nhost.prepare_to_trace()\n"
        "print(preloaded, gc.get_freeze_count(), len(gc.get_objects()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    preloaded, prepared, looked_at = map(int, done.stdout.split())
    assert looked_at < preloaded < prepared
