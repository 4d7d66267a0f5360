"""What the tests of faults report, for the table at the end of a run (`tests/conftest.py` prints it)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.clients import Tally


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, Tally], None]:
    """A function that adds a row to the table."""
    return lambda fault, tally: record_property("fault", tally.row(fault))
