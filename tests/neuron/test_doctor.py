"""Each planted fault is named, with the sentence that mends it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from tests.neuron_standin import HERE, environment
from tpray.commands import neuron_checks
from tpray.commands.check import Check
from tpray.commands.neuron_checks import Machine

GOOD = {
    "torch": "2.9.0", "torch-neuronx": "2.9.0.2.15.32035", "torch-xla": "2.9.0", "neuronx-cc": "2.26.6360.0",
    "libneuronxla": "2.2.17544.0", "numpy": "2.4.6",
}  # fmt: skip
NATIVE: dict[str, str | None] = {
    "torch": "2.13.0", "torch-neuronx": "2.13.3.0", "torch-xla": None, "neuronx-cc": "2.28.7631.0",
    "libneuronxla": None,
}  # fmt: skip
Plant = Callable[..., list[Check]]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """A function that makes a sound machine with the faults it is told, and examines it."""

    def make(
        packages: dict[str, str | None] | None = None, devices: int = 4, driver: bool = True, tools: bool = True,
        product: str = "trn1.32xlarge", busy: int | None = None, commands: Path = HERE / "bin", numpy: str = ">=2,<3",
        container: bool = False, **variables: str,
    ) -> list[Check]:  # fmt: skip
        installed = GOOD | (packages or {})

        def version(name: str) -> str:
            found = installed.get(name)
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr(neuron_checks, "version", version)
        monkeypatch.setattr(neuron_checks, "requires", {"neuronx-cc": ["networkx", f"numpy{numpy}"]}.get)
        if busy is not None:
            monkeypatch.setenv("NEURON_STANDIN_BUSY", str(busy))
        for number in range(devices):
            (tmp_path / f"neuron{number}").touch()
        if driver:
            (tmp_path / "driver").mkdir(exist_ok=True)
            (tmp_path / "driver" / "version").write_text("2.29.0.0\n")
        (tmp_path / "product_name").write_text(f"{product}\n")
        machine = Machine(
            variables, tmp_path, tmp_path / "driver", HERE / "bin" if tools else tmp_path, tmp_path / "product_name",
            commands, (tmp_path if container else tmp_path / "absent",),
        )  # fmt: skip
        return list(neuron_checks.examine(machine))

    return make


def problems(checks: list[Check]) -> str:
    return " | ".join(f"{f.name} {f.value}: {f.problem}" for f in checks if f.problem)


def test_a_sound_machine_has_no_problem(plant: Plant) -> None:
    found = plant()
    assert problems(found) == ""
    assert any(f.name == "NeuronCores" and f.value.startswith("8 on 4") for f in found)
    assert any(f.name == "driver" and f.value == "2.29.0.0" for f in found)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"packages": {"torch-neuronx": "1.0"}}, "pip uninstall torch-neuronx"),
        ({"packages": {"neuronx-cc": "1.0.post1"}}, "pip uninstall neuronx-cc"),
        ({"packages": {"torch-neuronx": None}}, "torch-neuronx missing: install it"),
        ({"packages": {"neuronx-cc": None}}, "neuronx-cc missing: the runtime neuron-xla needs it"),
        ({"packages": {"torch": "2.13.0"}}, "torch-neuronx 2.9 with torch 2.13: they must agree"),
        ({"packages": {"torch": "2.13.0", "torch-neuronx": "2.13.3.0"}}, "make an environment with the packages of"),
        ({"driver": False}, "install aws-neuronx-dkms"),
        ({"devices": 0}, "--device=/dev/neuron0"),
        ({"tools": False}, "install aws-neuronx-tools"),
        ({"busy": 4711}, "held by process 4711"),
        ({"commands": Path("/absent")}, "no command libneuronpjrt-path in /absent or on PATH"),
        ({"commands": Path("/absent"), "packages": NATIVE, "product": "trn2.48xlarge"}, "no command neuronx-cc in"),
        ({"numpy": "<=1.26.4"}, "neuronx-cc 2.26.6360.0 asks for numpy<=1.26.4, and tpray for 2.2"),
        ({"NEURON_RT_VISIBLE_CORES": "0-3"}, "write each core, as in 2,3, before Ray is started"),
        ({"NEURON_LOGICAL_NC_CONFIG": "2"}, "logical cores of 2 exist from Trn2 on"),
    ],
)
def test_a_fault_is_named(plant: Plant, fault: dict[str, Any], words: str) -> None:
    assert words in problems(plant(**fault))


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "2,3"}, "2,3: Ray gives out these cores"),  # a pod, which must keep it
        ({"TORCHELASTIC_RUN_ID": "x"}, "torch-xla would choose their cores by it"),
        ({"packages": NATIVE, "product": "trn2.48xlarge", "container": True}, "set TORCH_NEURONX_ENABLE_HOST_CC=1"),
        ({"packages": NATIVE, "product": "trn2.48xlarge", "KUBERNETES_SERVICE_HOST": "x"}, "ENABLE_HOST_CC=1"),
        ({"commands": Path("/absent"), "PATH": str(HERE / "bin")}, "8 on 4"),
    ],
)
def test_what_is_worth_knowing_is_said_and_is_no_problem(plant: Plant, machine: dict[str, Any], words: str) -> None:
    found = plant(**machine)
    assert problems(found) == ""
    assert any(words in check.value for check in found)


def test_what_does_not_concern_a_machine_is_not_said(plant: Plant) -> None:
    native: dict[str, Any] = {"packages": NATIVE, "product": "trn2.48xlarge"}
    told = {"container": True, "TORCH_NEURONX_ENABLE_HOST_CC": "0"}
    for machine in ({}, {"container": True}, native | {"TORCHELASTIC_RUN_ID": "x"}, native | told):
        assert not any("HOST_CC" in check.value or "TORCHELASTIC" in check.value for check in plant(**machine))


def test_a_tool_that_fails_is_named(plant: Plant, tmp_path: Path) -> None:
    tool = tmp_path / "neuron-ls"
    tool.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert "neuron-ls fails: run" in problems(plant(tools=False))


def test_a_machine_without_neuron_says_so_in_one_line(tmp_path: Path) -> None:
    (line,) = neuron_checks.examine(Machine({}, tmp_path, tmp_path, tmp_path, tmp_path / "absent"))
    assert line.problem is None
    assert "no NeuronCores" in line.value


def test_too_old_a_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpray.commands import machine_checks

    monkeypatch.setattr(machine_checks, "version", lambda name: "4.57.1" if name == "transformers" else "99.0")
    faults = [check for check in machine_checks.examine() if check.name == "transformers"]
    assert problems(faults) == "transformers 4.57.1: older than the tested 5.23: pip install 'transformers>=5.23'"


def test_the_command_shows_the_faults_and_fails(tmp_path: Path) -> None:
    """The XLA stack's packages beside another torch, without a driver, a device or a variable that Ray can read."""
    environ = environment("neuron-xla", tmp_path, tmp_path) | {"NEURON_RT_VISIBLE_CORES": "0-3", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "tpray", "doctor"], env=os.environ | environ, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    for words in (
        "torch-neuronx 2.9 with torch 2.13", "install aws-neuronx-dkms", "--device=/dev/neuron0",
        "write each core, as in 2,3",
    ):  # fmt: skip
        assert words in done.stdout
