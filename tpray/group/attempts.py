"""What a start does when its ranks do not come up: wait for busy cores, or go on with another layout.

Where a platform has two layouts (`Platform.layouts`) and the user has not chosen one, the first is on trial until the
group is ready. The second follows if the first fails in a phase that depends on it: the accelerator's runtime does not
start ("connect"), the programs are not loaded ("load"), or run wrongly or not at all ("check", "warm up"). An error, a
rank that dies and a phase or step past its limit all count. What a user has to mend, such as a damaged artifact, does
not: the other layout would raise the same.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

from tpray.errors import CompileError, GroupError, PlacementError, StepError, TprayError
from tpray.platforms.topology import Topology

PROVING = ("connect", "load", "check", "warm up")
"""The phases whose failure may be the layout's."""

TRIAL_S = {"load": 300.0}
"""Limits of phases, seconds, while a layout is on trial; other phases keep theirs.

A user of Trn2 reports 44 GB loaded in 634 s, which makes 16 GB in four minutes: a model of 8 billion parameters in
bfloat16. Busy cores are waited for up to a minute more. What takes longer hangs: ranks that wait for one another in a
communicator that never forms raise nothing.
"""

PAUSE_S = 2.0
"""How long to wait before busy cores are tried again by new processes, give or take half of it."""

_SHOWN = 300  # characters of an error in a line


@dataclass(frozen=True)
class Attempt:
    """How to bring the ranks up again: on what, after how many seconds, and a sentence that says why."""

    topology: Topology
    pause_s: float
    reason: str


class Attempts:
    """The attempts of one start.

    Args:
        topology: what the first one is made with.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.layout_failure: str | None = None
        """How the first layout failed, if it did: "process-per-rank failed in the phase load: ..."."""
        self._refused: float | None = None  # since when the cores are busy, by time.monotonic()

    def after(self, error: Exception, phase: str, seconds: float) -> Attempt | None:
        """The next attempt, or None where there is none to make.

        Args:
            error: what ended the last one.
            phase: the one it ended in, which had lasted ``seconds``; a rank may have waited for busy cores so long.
        """
        platform, now = self.topology.platform, time.monotonic()
        if platform.is_busy(error):
            self._refused = now - seconds if self._refused is None else self._refused
            pause_s = PAUSE_S * random.uniform(0.5, 1.5)
            if now + pause_s < self._refused + platform.busy_limit_s:
                return Attempt(
                    self.topology,
                    pause_s,
                    f"the {platform.resource_label} are busy, and are tried again: {_line(error)}",
                )
            # Still busy: the layout's own process of one core may keep the next from its core of the same device.
        fallback = self.topology.fallback
        if fallback is None or phase not in PROVING or not _may_be_the_layouts(error):
            return None
        self.layout_failure = f"{self.topology.layout} failed in the phase {phase}: {_line(error)}"
        self.topology, self._refused = replace(self.topology, layout=fallback, fallback=None), None
        return Attempt(
            self.topology, 0.0, f"{self.layout_failure}; the group goes on with {fallback} (--neuron-layout {fallback})"
        )

    def explain(self, error: Exception) -> Exception:
        """``error``, which ended the last attempt; if two layouts have failed, one that names both failures."""
        if self.layout_failure is None or not _may_be_the_layouts(error):
            return error
        text = f"{self.layout_failure}; {self.topology.layout} failed as well: {error}"
        return type(error)(text) if isinstance(error, GroupError) else GroupError(text)


def _may_be_the_layouts(error: Exception) -> bool:
    """Whether another layout may do better: not where the user, a compiler or the cluster is at fault."""
    if isinstance(error, (CompileError, PlacementError)):
        return False
    return isinstance(error, (GroupError, StepError)) or not isinstance(error, TprayError)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:_SHOWN] if lines else type(error).__name__
