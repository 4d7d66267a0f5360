"""How each test ended, for the report."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

ENDED = pytest.StashKey[str]()
"""What a test that failed has raised; absent if it passed."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call" and report.failed:
        item.stash[ENDED] = report.longreprtext[-4000:]
    return report
