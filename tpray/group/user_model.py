"""A group whose ranks run a user's own model; see `tpray.trace` for the calls that make one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tpray.artifacts.folder import UserModelArtifact, rank_folder
from tpray.artifacts.manifest import UserModelManifest, check_cores, machine, now, versions, write_manifest
from tpray.errors import ConfigError
from tpray.group.executor import Executor
from tpray.group.group import Group
from tpray.group.jobs import MakeModel, UserModelJob
from tpray.group.phases import PhaseReport
from tpray.group.wire import Array
from tpray.runtime.structure import Structure


@dataclass(frozen=True)
class UserModelTask:
    """What to trace, and the new folder that the artifact goes to.

    examples: flat, of each set of shapes. inputs: what holds each of them. compiler_args: see
    `Runtime.trace_user_model`.
    """

    make: MakeModel
    examples: Sequence[tuple[Tensor, ...]]
    inputs: Structure
    directory: Path
    compiler_args: tuple[str, ...] = ()


class UserModelGroup(Group):
    """Ranks that trace ``work`` and run it, or run what was traced before.

    Args:
        work: what to trace, or an artifact.
        executor, step_timeout_s, progress: as in `Group`.
    """

    def __init__(
        self,
        work: UserModelTask | UserModelArtifact,
        executor: Executor,
        step_timeout_s: float = 600.0,
        progress: Callable[[PhaseReport], None] | None = None,
    ) -> None:
        super().__init__(executor, step_timeout_s, progress)
        self._work = work

    @property
    def artifact(self) -> UserModelArtifact:
        """What the ranks run, once the group has started."""
        assert isinstance(self._work, UserModelArtifact), "the group was not started"
        return self._work

    def _size(self, inputs: Sequence[Array]) -> None:
        """Not known: each of a user's programs is another one, and may compile when it is first called."""

    async def _resolve(self) -> None:
        if not isinstance(self._work, UserModelArtifact):
            return
        manifest, topology = self._work.manifest, self.executor.topology
        if manifest.tp != topology.tp:
            raise ConfigError(
                f"{self._work.directory} was traced for tp {manifest.tp}, and this is a group of {topology.tp}"
            )
        if manifest.runtime != topology.runtime:
            raise ConfigError(
                f"{self._work.directory} was traced for the runtime {manifest.runtime}, and this machine's is "
                f"{topology.runtime}: trace the model here"
            )
        check_cores(manifest, topology, str(self._work.directory))

    @property
    def _must_trace(self) -> bool:
        return isinstance(self._work, UserModelTask)

    async def _prepare(self) -> None:
        if isinstance(self._work, UserModelTask):
            task = self._work
            self._work = await self._trace_phase(lambda: self._trace(task))
        if self._topology.tracing:
            return
        await self._phase("load", self.executor.load_user_model(self._work))

    async def _trace(self, task: UserModelTask) -> UserModelArtifact:
        folders = [task.directory / rank_folder(rank) for rank in range(self.tp)]
        given = task.make, tuple(task.examples), task.inputs, os.getcwd()
        jobs = [UserModelJob(*given, folder, task.compiler_args) for folder in folders]
        try:
            traced = await self.executor.trace_user_model(jobs)
        except BaseException:
            shutil.rmtree(task.directory, ignore_errors=True)
            raise
        runtime, (family, lnc) = self._topology.runtime, self._topology.compiled_for
        manifest = UserModelManifest(
            created=now(),
            versions=versions(runtime),
            machine=machine(),
            runtime=runtime,
            instance_family=family,
            lnc=lnc,
            tp=self.tp,
            ranks=tuple(outcome.record for outcome in traced),
            programs=traced[0].programs,
            inputs=task.inputs,
            outputs=traced[0].outputs,
            aliases=traced[0].aliases,
        )
        write_manifest(task.directory, manifest)
        return UserModelArtifact(task.directory, manifest)
