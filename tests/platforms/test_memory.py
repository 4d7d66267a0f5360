"""How much memory there is: one answer, whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpray.artifacts import resolve
from tpray.artifacts.resolve import find_model
from tpray.commands import machine_checks
from tpray.config import ModelConfig
from tpray.errors import ConfigError
from tpray.platforms import memory as memories
from tpray.platforms.memory import Memory, memory
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
        (str(4 << 30), str(1 << 30), Memory(3 << 30, 4 << 30, limited=True)),
        (str(64 << 30), str(1 << 30), Memory(8 << 30, 16 << 30)),
    ],
)
def test_a_control_group_may_limit_it(
    limit: str | None, used: str | None, expected: Memory, meminfo: Path, tmp_path: Path
) -> None:
    for name, value in (("max", limit), ("current", used)):
        if value is not None:
            (tmp_path / f"memory.{name}").write_text(value)
    assert memory(meminfo, tmp_path) == expected


def test_serve_and_doctor_look_at_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Memory(1 << 20, 1 << 30, limited=True)
    monkeypatch.setattr(memories, "memory", lambda: small)
    monkeypatch.setattr(machine_checks, "memory", memories.memory)
    assert vars(resolve)["available_bytes"] is memories.available_bytes
    with pytest.raises(ConfigError, match=r"GiB and this machine has 0\.0 GiB"):
        find_model(ModelConfig(), Topology(1))
    assert machine_checks._memory().value.startswith("0.0 of 1.0 GiB (a control group's limit) available")
