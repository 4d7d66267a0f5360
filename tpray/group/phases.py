"""The phases of a start, and what is reported of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

PHASES: dict[str, float] = {
    "resolve": 3600.0,  # a Hub model may have to be downloaded
    "place": 120.0,
    "spawn": 120.0,
    "pin": 10.0,
    "connect": 60.0,
    "trace": 3600.0,
    "load": 600.0,
    "check": 120.0,
    "warm up": 300.0,
}
"""The start-up phases in their order, and how long each may take, seconds."""


@dataclass(frozen=True)
class PhaseReport:
    """One phase of a start: its number from 1, how long it took, and what it found, or how it failed where the start
    goes on all the same; or, if not ``done``, so far.

    A number of 0 is a span outside a group's phases, such as Ray's start. ended: `time.monotonic`, which all processes
    of a machine share.
    """

    number: int
    name: str
    seconds: float
    note: str = ""
    done: bool = True
    ended: float = 0.0


@dataclass
class CurrentPhase:
    """The phase that is going on: since when, and how many reports have come of it."""

    name: str
    started: float
    reports: int = 0


LAST_SPAN = "tokenizer"
"""What ends the start of an engine."""


class Spans:
    """The spans of one start. Each begins where the one before has ended, so that their sum is the time it took.

    Args:
        started: when the first one begins, `time.monotonic`; default: now.
        show: called with each.
    """

    def __init__(self, show: Callable[[PhaseReport], None], started: float | None = None) -> None:
        self._show = show
        self.ended = time.monotonic() if started is None else started
        """When the last one has ended."""
        self.reports: list[PhaseReport] = []

    def end(self, name: str, note: str = "") -> None:
        """A span outside the phases has ended now."""
        self.take(PhaseReport(0, name, 0.0, note, ended=time.monotonic()))

    def take(self, report: PhaseReport) -> None:
        """A span has ended; its length is counted anew, from where the one before has ended."""
        counted = replace(report, seconds=max(0.0, report.ended - self.ended))
        self.ended = max(self.ended, report.ended)
        self.reports.append(counted)
        self._show(counted)


def process_started() -> float:
    """When this process was started, `time.monotonic`, to 10 ms. Source: proc(5), the 22nd field of stat."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)  # which counts the time that the machine sleeps
    return time.monotonic() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))
