"""The table that ``make bench`` ends with: every figure that has a target, as a ratio of two values of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """One side of a ratio: a value, and whose it is where there is a choice."""

    value: float
    whose: str = ""


@dataclass(frozen=True)
class Figure:
    """A ratio with a target: ``ours`` over ``theirs``; None where it was not measured.

    at_least: the ratio is to be no smaller than the target; otherwise no larger.
    unit: of both sides.
    """

    name: str
    target: float
    ours: Side | None
    theirs: Side | None
    unit: str
    at_least: bool = False

    @property
    def ratio(self) -> float | None:
        return self.ours.value / self.theirs.value if self.ours and self.theirs and self.theirs.value else None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        good = self.ratio >= self.target if self.at_least else self.ratio <= self.target
        return "met" if good else "MISSED"

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table shows of it."""
        measured = "-" if self.ratio is None else f"{self.ratio:.2f}"
        sign = ">=" if self.at_least else "<="
        return (
            self.name,
            f"{sign} {self.target:g}",
            measured,
            self._side(self.ours),
            self._side(self.theirs),
            self.verdict,
        )

    def _side(self, side: Side | None) -> str:
        if side is None:
            return "-"
        value = f"{side.value:.3g}" if side.value < 1000 else f"{side.value:.0f}"
        return f"{value} {self.unit}" + (f" ({side.whose})" if side.whose else "")


HEADINGS = ("figure", "target", "measured", "tpray", "against", "")


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the README has them."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]]) + "\n"


def smallest(sides: Sequence[Side | None]) -> Side | None:
    """The side with the smallest value of those that were measured."""
    return min((side for side in sides if side), key=lambda side: side.value, default=None)


def largest(sides: Sequence[Side | None]) -> Side | None:
    """The side with the largest value of those that were measured."""
    return max((side for side in sides if side), key=lambda side: side.value, default=None)
