"""Prints the lowest versions that `pyproject.toml` allows, as constraints for pip: `make test-lowest` installs them."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
ON_CPU_CORES = {"torch": "2.13.0"}
"""What is not its lower bound: torch's is that of neuron-xla, which `make test-xla` has."""


def lowest() -> dict[str, str]:
    """The lowest version of what tpray needs and of what its tests do, by name."""
    requirements = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    bounds = {each.name: spec.version for each in requirements for spec in each.specifier if spec.operator == ">="}
    return bounds | ON_CPU_CORES


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest().items()))
