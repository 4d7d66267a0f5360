"""The phases of a start, and what is reported of them."""

from __future__ import annotations

from dataclasses import dataclass

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
    goes on all the same; or, if not ``done``, so far."""

    number: int
    name: str
    seconds: float
    note: str = ""
    done: bool = True


@dataclass
class CurrentPhase:
    """The phase that is going on: since when, and how many reports have come of it."""

    name: str
    started: float
    reports: int = 0
