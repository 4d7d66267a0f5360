"""One line of `tpray doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the report. problem: the sentence that mends it, if something is wrong."""

    name: str
    value: str
    problem: str | None = None
