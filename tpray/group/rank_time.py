"""Where the time of a rank goes in steps: what it computes, and what it waits for others. The slow one waits least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RankTime(NamedTuple):
    """How long a rank's program ran in a step, seconds, and how much of that it waited for others; None: not known."""

    run_s: float
    wait_s: float | None

    @property
    def compute_s(self) -> float:
        """How long it did not wait, as far as that is known."""
        return self.run_s - (self.wait_s or 0.0)

    @classmethod
    def together(cls, times: Sequence[RankTime]) -> RankTime:
        """Those of several steps, or parts of one."""
        waits = [time.wait_s for time in times if time.wait_s is not None]
        return cls(sum(time.run_s for time in times), sum(waits) if len(waits) == len(times) else None)


@dataclass
class RankTotal:
    """Of one rank, whatever process it is in: seconds that only grow, also when the group restarts.

    compute_s: in its program, without waiting. wait_s: for others in collectives; None: that is not known.
    """

    compute_s: float = 0.0
    wait_s: float | None = None

    def add(self, time: RankTime) -> None:
        """The rank has ended a step."""
        self.compute_s += time.compute_s
        if time.wait_s is not None:
            self.wait_s = (self.wait_s or 0.0) + time.wait_s
