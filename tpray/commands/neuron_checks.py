"""What `tpray doctor` says of NeuronCores: packages, driver, devices, and who holds the cores.

Sources: Neuron's set-up guide (packages, driver, tools), its runtime configuration guide (variables), neuron-ls's JSON,
how Ray reads NEURON_RT_VISIBLE_CORES (``ray/_private/accelerators/neuron.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tpray.commands.check import Check
from tpray.installation import install_command
from tpray.platforms import PLATFORMS
from tpray.platforms.neuron import DEVICES, DMI, NEURON_XLA, PIP_REPOSITORY, STACKS, instance_family, stack_of

DRIVER = Path("/sys/module/neuron")
TOOLS = Path("/opt/aws/neuron/bin")
NEWEST_TORCH = (2, 13)
"""That tpray installs with; see pyproject.toml."""

COMMANDS = {"neuronx-cc": "neuronx-cc", "libneuronpjrt-path": "libneuronxla"}
"""What torch-neuronx calls by name, and which package brings it."""

CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
"""Files that Docker and Podman leave in a container."""

PLACEHOLDERS = {"torch-neuronx": "1.0", "neuronx-cc": "1.0.post1", "neuronx-distributed": "0.1"}
"""Versions on the public index that only raise an error when they are imported."""


@dataclass(frozen=True)
class Machine:
    """Where to look.

    variables: of the environment. scripts: where the interpreter's environment has its commands.
    """

    variables: Mapping[str, str]
    devices: Path = DEVICES
    driver: Path = DRIVER
    tools: Path = TOOLS
    product: Path = DMI
    scripts: Path = Path(sys.executable).parent
    container_marks: tuple[Path, ...] = CONTAINER_MARKS

    @property
    def in_container(self) -> bool:
        return "KUBERNETES_SERVICE_HOST" in self.variables or any(mark.exists() for mark in self.container_marks)


def examine(machine: Machine) -> Iterator[Check]:
    """Every check of Neuron; one line where there is nothing of it."""
    found = {name: _version(name) for name in (*NEURON_XLA.packages, "neuronx-distributed")}
    devices = sorted(machine.devices.glob("neuron[0-9]*"))
    family = instance_family(machine.product)
    if not devices and family is None and not any(found.values()):
        yield Check("neuron", "no NeuronCores and none of their packages here")
        return
    yield Check("neuron", f"instance family {family or 'not known'}, {len(devices)} devices")
    stack = yield from _packages(found)
    if family is not None and stack is not None and stack not in STACKS[family]:
        yield Check(
            "", f"{family} with the runtime {stack}",
            f"it does not know {family}'s cores: make an environment with the packages of {STACKS[family][0]}",
        )  # fmt: skip
    if stack is not None:
        yield from _commands(machine, stack)
        yield from _numpy(found["neuronx-cc"])
    yield from _devices(machine, devices)
    yield from _cores(machine)
    yield from _variables(machine, family, stack)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(found: Mapping[str, str | None]) -> Generator[Check, None, str | None]:
    """The checks; returns which runtime is installed."""
    for name, installed in found.items():
        if installed is not None and installed == PLACEHOLDERS.get(name):
            yield Check(
                name, f"{installed}, a placeholder",
                f"it only raises an error: pip uninstall {name}, and install it from {PIP_REPOSITORY}",
            )  # fmt: skip
    main = found["torch-neuronx"]
    if main is None:
        commands = f"{install_command('neuron-xla')} on Inf2 and Trn1, {install_command('neuron')} on Trn2"
        yield Check("torch-neuronx", "missing", f"install it from {PIP_REPOSITORY}: {commands}")
        return None
    stack: str | None = stack_of(main)
    if stack is None:
        return None
    for name in PLATFORMS[stack].packages:
        installed = found[name]
        problem = None if installed else f"the runtime {stack} needs it: install it from {PIP_REPOSITORY}"
        yield Check(name, installed or "missing", problem)
    for name in ("torch-neuronx", "torch-xla"):
        own, torch = _minor(found[name]), _minor(_version("torch"))
        if name in PLATFORMS[stack].packages and own is not None and own != torch:
            known = tuple(map(int, own.split("."))) <= NEWEST_TORCH
            mend = f"they must agree: pip install 'torch=={own}.*' with that {name}"
            too_new = f"tpray knows no torch {own} yet: install {name} {'.'.join(map(str, NEWEST_TORCH))}"
            yield Check("", f"{name} {own} with torch {torch}", mend if known else too_new)
    return stack


def _minor(found: str | None) -> str | None:
    return None if found is None else ".".join(found.split("+", maxsplit=1)[0].split(".")[:2])


def _commands(machine: Machine, stack: str) -> Iterator[Check]:
    """Whether a rank would find them: its PATH is this one, with the folder of the interpreter before it."""
    path = os.pathsep.join((str(machine.scripts), machine.variables.get("PATH", "")))
    for command, package in COMMANDS.items():
        if package in PLATFORMS[stack].packages and shutil.which(command, path=path) is None:
            yield Check(
                "", f"no command {command} in {machine.scripts} or on PATH",
                f"torch-neuronx calls it: pip install --force-reinstall --no-deps {package}, from {PIP_REPOSITORY}",
            )  # fmt: skip


def _numpy(compiler: str | None) -> Iterator[Check]:
    """Whether numpy is one that the installed compiler asks for, by its own metadata."""
    installed = _version("numpy")
    if compiler is None or installed is None:
        return
    for requirement in map(Requirement, requires("neuronx-cc") or ()):
        wanted, marker = requirement.specifier, requirement.marker
        if requirement.name != "numpy" or (marker is not None and not marker.evaluate()):
            continue
        if not wanted.contains(installed, prereleases=True):
            yield Check(
                "numpy", installed,
                f"neuronx-cc {compiler} asks for numpy{wanted}, and tpray for 2.2 or newer: pip install "
                f"'numpy>=2.2,{wanted}', with neuronx-cc 2.22 or newer",
            )  # fmt: skip


def _devices(machine: Machine, devices: list[Path]) -> Iterator[Check]:
    if not machine.driver.is_dir():
        yield Check("driver", "missing", "the kernel module neuron is not loaded: install aws-neuronx-dkms")
    else:
        file = machine.driver / "version"
        yield Check("driver", file.read_text().strip() if file.is_file() else "loaded")
    if not devices:
        yield Check(
            "devices", f"none under {machine.devices}",
            "a container is given them with docker run --device=/dev/neuron0, or by Kubernetes' device plugin",
        )  # fmt: skip
    closed = [path.name for path in devices if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        yield Check("devices", f"{', '.join(closed)} may not be opened", "give this user read and write access to them")


def _cores(machine: Machine) -> Iterator[Check]:
    tool = shutil.which("neuron-ls", path=f"{machine.tools}:{machine.variables.get('PATH', '')}")
    if tool is None:
        yield Check(
            "neuron-ls", "missing",
            "install aws-neuronx-tools: Ray counts the cores with it; without it start Ray with "
            """--resources='{"neuron_cores": N}'""",
        )  # fmt: skip
        return
    try:
        done = subprocess.run([tool, "--json-output"], capture_output=True, timeout=30, check=True, text=True)
        listed: list[dict[str, Any]] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        yield Check("neuron-ls", "fails", f"run {tool} by hand, and see what it lacks: {e}")
        return
    if Path(tool).parent != machine.tools:
        yield Check("neuron-ls", tool, f"Ray looks for it in {machine.tools} only: start Ray with --resources")
    yield Check("NeuronCores", f"{sum(device.get('nc_count', 0) for device in listed)} on {len(listed)} devices")
    for device in listed:
        for process in device.get("neuron_processes") or []:
            yield Check(
                "", f"device {device.get('neuron_device')} is held by process {process.get('pid')}: "
                f"{process.get('command', '')}",
                f"end it to have its cores: kill {process.get('pid')}",
            )  # fmt: skip


def _variables(machine: Machine, family: str | None, stack: str | None) -> Iterator[Check]:
    set_to = machine.variables
    cores = set_to.get("NEURON_RT_VISIBLE_CORES")
    if cores and not all(core.isdecimal() for core in cores.split(",")):
        yield Check(
            "", f"NEURON_RT_VISIBLE_CORES={cores}",
            "write each core, as in 2,3, before Ray is started, which reads a range as one core",
        )  # fmt: skip
    elif cores:  # as Kubernetes' device plugin sets it
        yield Check("", f"NEURON_RT_VISIBLE_CORES={cores}: Ray gives out these cores and no others")
    if stack == "neuron-xla" and "TORCHELASTIC_RUN_ID" in set_to:
        yield Check(
            "", "TORCHELASTIC_RUN_ID is set: ranks do not get it, since torch-xla would choose their cores by it"
        )
    if stack == "neuron" and machine.in_container and "TORCH_NEURONX_ENABLE_HOST_CC" not in set_to:
        yield Check("", "a container: should a start hang, set TORCH_NEURONX_ENABLE_HOST_CC=1 before Ray is started")
    logical = set_to.get("NEURON_LOGICAL_NC_CONFIG")
    if logical is not None and (logical not in ("1", "2") or (logical == "2" and family in ("inf2", "trn1"))):
        yield Check(
            "", f"NEURON_LOGICAL_NC_CONFIG={logical}", "logical cores of 2 exist from Trn2 on: unset it, and use --lnc"
        )
    elif logical is not None:
        yield Check("", f"NEURON_LOGICAL_NC_CONFIG={logical}: name it to tpray too, with --lnc {logical}")
