"""`make test-lowest` has a version for everything that it installs."""

from __future__ import annotations

from packaging.requirements import Requirement

from tests.package.lowest import PROJECT, lowest


def test_every_requirement_has_a_lower_bound_and_takes_it() -> None:
    found = lowest()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]):
        assert requirement.specifier.contains(found[requirement.name]), requirement
