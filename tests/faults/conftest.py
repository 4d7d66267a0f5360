"""The table of what became of the requests in each fault, at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.clients import Tally


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, Tally], None]:
    """A function that adds a row to the table."""
    return lambda fault, tally: record_property("fault", tally.row(fault))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table; the README has it from here."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for test in terminalreporter.stats.get(outcome, [])
        for name, value in test.user_properties
        if name == "fault" and test.when == "call"
    ]
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(
            "| fault | sent | answered | refused honestly | lost | wrong | longest time without an answer |"
        )
        for row in rows:
            terminalreporter.write_line(row)
