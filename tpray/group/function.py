"""A group whose ranks run a model of the user's own; see `tpray.trace` for the calls that make one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tpray.errors import ConfigError, TprayError
from tpray.group.life import PhaseReport, RankGroup
from tpray.group.ranks import Ranks
from tpray.group.store import compilations
from tpray.group.worker import FunctionTrace, MakeModel
from tpray.runtime import artifact as artifacts
from tpray.runtime.artifact import FunctionArtifact, FunctionManifest
from tpray.runtime.base import runtime_for


@dataclass(frozen=True)
class TraceJob:
    """What to trace, and the new folder that the artifact goes to."""

    make: MakeModel
    examples: list[tuple[Tensor, ...]]
    directory: Path


class FunctionGroup(RankGroup):
    """Ranks that trace ``work`` and run it, or run what was traced before.

    Args:
        work: what to trace, or an artifact.
        ranks, step_timeout_s, progress: as in `RankGroup`.
    """

    def __init__(
        self,
        work: TraceJob | FunctionArtifact,
        ranks: Ranks,
        step_timeout_s: float = 600.0,
        progress: Callable[[PhaseReport], None] | None = None,
    ) -> None:
        super().__init__(ranks, step_timeout_s, progress)
        self._work = work

    @property
    def artifact(self) -> FunctionArtifact:
        """What the ranks run, once the group has started."""
        assert isinstance(self._work, FunctionArtifact), "the group was not started"
        return self._work

    async def _resolve(self) -> None:
        if not isinstance(self._work, FunctionArtifact):
            return
        manifest = self._work.manifest
        if manifest.tp != self.ranks.tp:
            raise ConfigError(
                f"{self._work.directory} was traced for tp {manifest.tp}, and this is a group of {self.ranks.tp}"
            )
        if manifest.runtime != self.ranks.runtime:
            raise ConfigError(
                f"{self._work.directory} was traced for the runtime {manifest.runtime}, and this machine's is "
                f"{self.ranks.runtime}: trace the model here"
            )

    async def _prepare(self) -> None:
        if isinstance(self._work, TraceJob):
            self._work = await self._phase("trace", self._trace(self._work))
        await self._phase("load", self.ranks.call("load_function", self._work))

    async def _trace(self, job: TraceJob) -> FunctionArtifact:
        folders = [job.directory / f"rank_{rank:02d}" for rank in range(self.ranks.tp)]
        each = [(job.make, job.examples, os.getcwd(), folder) for folder in folders]
        at_once = compilations(runtime_for(self.ranks.runtime), self.ranks.tp)
        traced: list[FunctionTrace | TprayError] = await self.ranks.call(
            "try_trace_function", each=each, at_once=at_once
        )
        for outcome in traced:  # what one rank says of the user's code, all say: once, from the first
            if isinstance(outcome, TprayError):
                shutil.rmtree(job.directory, ignore_errors=True)
                raise outcome
        done = [outcome for outcome in traced if isinstance(outcome, FunctionTrace)]
        manifest = FunctionManifest(
            created=artifacts.now(),
            versions=artifacts.versions(self.ranks.runtime),
            machine=artifacts.machine(),
            runtime=self.ranks.runtime,
            tp=self.ranks.tp,
            ranks=tuple(outcome.record for outcome in done),
            programs=done[0].programs,
            aliases=done[0].aliases,
        )
        artifacts.write_manifest(job.directory, manifest)
        return FunctionArtifact(job.directory, manifest)
