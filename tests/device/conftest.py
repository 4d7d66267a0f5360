"""How each test ended, for the report."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

ENDED = pytest.StashKey[str]()
"""Why a test failed or was skipped; absent if it passed."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    if not report.passed and report.when != "teardown":
        item.stash[ENDED] = f"{report.outcome}: {report.longreprtext[-4000:]}"
    return report
