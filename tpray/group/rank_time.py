"""Where the time of a rank goes in steps: what it computes, and what it waits for others. The slow one waits least."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RankTime:
    """Of one rank, whatever process it is in: seconds that only grow, also when the group restarts.

    compute_s: in its program, without waiting. wait_s: for others in collectives; None: that is not known.
    program_s: both, as far as steps have ended.
    """

    compute_s: float = 0.0
    wait_s: float | None = None
    program_s: float = 0.0
    _waited_before_s: float = 0.0  # by processes that are gone

    def update(self, wait_s: float | None, ends: bool = False) -> None:
        """Take how long its process has waited so far; None: that is not known. ends: another one comes.

        How long it waits is known at once, and how long its program took only at the end of a step: until then what it
        computed is not known to have grown.
        """
        if wait_s is not None:
            self.wait_s = self._waited_before_s + wait_s
        waited_s = self.wait_s or 0.0
        self.compute_s = max(self.compute_s, self.program_s - waited_s)
        if ends:  # a step that it did not end is not counted
            self._waited_before_s, self.program_s = waited_s, self.compute_s + waited_s
