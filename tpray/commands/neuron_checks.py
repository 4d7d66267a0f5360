"""What `tpray doctor` says of NeuronCores: packages, driver, devices, and who holds the cores.

Sources: Neuron's set-up guide (packages, driver, tools), its runtime configuration guide (variables), neuron-ls's JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpray.commands.check import Check
from tpray.platforms import PLATFORMS
from tpray.platforms.neuron import DEVICES, DMI, NEURON_XLA, PIP_REPOSITORY, STACKS, instance_family, stack_of

DRIVER = Path("/sys/module/neuron")
TOOLS = Path("/opt/aws/neuron/bin")
NEWEST_TORCH = (2, 13)
"""That tpray installs with; see pyproject.toml."""

PLACEHOLDERS = {"torch-neuronx": "1.0", "neuronx-cc": "1.0.post1", "neuronx-distributed": "0.1"}
"""Versions on the public index that only raise an error when they are imported."""


@dataclass(frozen=True)
class Machine:
    """Where to look. variables: those of the environment that Neuron or Ray read."""

    variables: Mapping[str, str]
    devices: Path = DEVICES
    driver: Path = DRIVER
    tools: Path = TOOLS
    product: Path = DMI


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
    yield from _devices(machine, devices)
    yield from _cores(machine)
    yield from _variables(machine, family)


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
        extras = "'tpray[neuron-xla]' on Inf2 and Trn1, 'tpray[neuron]' on Trn2"
        yield Check("torch-neuronx", "missing", f"install it from {PIP_REPOSITORY}: pip install {extras}")
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


def _variables(machine: Machine, family: str | None) -> Iterator[Check]:
    set_to = machine.variables
    if "NEURON_RT_VISIBLE_CORES" in set_to:
        yield Check(
            "", f"NEURON_RT_VISIBLE_CORES={set_to['NEURON_RT_VISIBLE_CORES']}",
            "unset it before Ray is started, which reads a range as one core and gives each rank its own cores",
        )  # fmt: skip
    if "TORCHELASTIC_RUN_ID" in set_to:
        yield Check("", "TORCHELASTIC_RUN_ID is set", "unset it: torch-neuronx would wait for torchrun's agent")
    logical = set_to.get("NEURON_LOGICAL_NC_CONFIG")
    if logical is not None and (logical not in ("1", "2") or (logical == "2" and family in ("inf2", "trn1"))):
        yield Check(
            "", f"NEURON_LOGICAL_NC_CONFIG={logical}", "logical cores of 2 exist from Trn2 on: unset it, and use --lnc"
        )
    elif logical is not None:
        yield Check("", f"NEURON_LOGICAL_NC_CONFIG={logical}: name it to tpray too, with --lnc {logical}")
