"""A group whose ranks are one classifier."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpray.artifacts.folder import Artifact, rank_folder
from tpray.artifacts.resolve import Found, Resolution, TraceTask, recall_or_find, resolve
from tpray.artifacts.store import COPIED, Copied
from tpray.artifacts.tracing import Traced, make_artifact
from tpray.config import ModelConfig
from tpray.errors import ArtifactError, NotReadyError, ParityError, RankError, StepError
from tpray.group.channel import StepResult
from tpray.group.executor import Executor
from tpray.group.group import Group
from tpray.group.jobs import Loaded, ShardJob
from tpray.group.phases import PhaseReport
from tpray.group.wire import Array, Kind
from tpray.runtime.buckets import Bucket, fitting, largest_batch, pad_to
from tpray.runtime.canary import TOLERANCE, canary_steps, check_logits, difference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _CanaryStep:
    """A step of the canary: the program's inputs, the unsharded model's logits, and what this group answered first.

    repeatable: the group gave the same bits when it was asked at once again.
    """

    inputs: Sequence[Array]
    reference: Array
    answer: Array
    repeatable: bool


class ClassifierGroup(Group):
    """One tensor-parallel classifier, owned by the event loop that starts it.

    Args:
        model: what to serve.
        executor, step_timeout_s, progress: as in `Group`.
        found: what `recall_or_find` has found for ``model``, if it was asked already.
        out: keep the traced artifact in this folder instead of in the cache.
    """

    def __init__(
        self,
        model: ModelConfig,
        executor: Executor,
        step_timeout_s: float = 60.0,
        progress: Callable[[PhaseReport], None] | None = None,
        found: Found | None = None,
        out: Path | None = None,
    ) -> None:
        super().__init__(executor, step_timeout_s, progress)
        self.parity = float("nan")
        self.canary_difference, self.canary_at = float("nan"), float("-inf")
        """Off the unsharded model, of the step of the canary that was answered last; when, `time.monotonic`."""
        self.canary_failures = 0
        """How often its answer was wrong, after which the group restarts."""
        self.artifact_loads: Counter[str] = Counter()
        """How often an artifact came from where: named, cache, store, traced, or another group that was waited for."""
        self.traced = False
        self.packs_rows, self.parts = Loaded()
        self._one_in_parts = asyncio.Lock()
        self._model, self._found, self._out = model, found, out
        self._resolution = Resolution()
        self._canary: list[_CanaryStep] = []
        self._copied: list[Copied] = []

    @property
    def artifact(self) -> Artifact:
        """What the ranks run, once the group has started."""
        assert self._resolution.artifact is not None, "the group was not started"
        return self._resolution.artifact

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes that the program takes; none: any."""
        return self.artifact.manifest.buckets

    @property
    def url(self) -> str | None:
        """Where the artifact is in the store that machines share; None without one."""
        return self._resolution.url

    async def _run(self, inputs: Sequence[Array], timeout_s: float | None = None, kind: Kind = Kind.STEP) -> StepResult:
        """See `Group`; a program of fixed shapes is given its inputs in buckets, one after another.

        Raises:
            InputTooLongError: a row is longer than every bucket.
        """
        if not self.buckets:
            return await super()._run(inputs, timeout_s, kind)
        rows, length = inputs[0].shape
        size = largest_batch(self.buckets, length)
        logits, results = [], list[StepResult]()
        for start in range(0, rows, size):
            part = [array[start : start + size] for array in inputs]
            bucket = fitting(self.buckets, len(part[0]), length)
            assert bucket is not None, "largest_batch() found one"
            result = await super()._run(pad_to(part, bucket, self.artifact.manifest.model.pad_id), timeout_s)
            own = result.logits[: len(part[0])]
            logits.append(own if own.ndim == 2 else own[:, :length])
            results.append(result)
        return StepResult.of_parts((np.concatenate(logits),), results)

    async def step_in_parts(self, inputs: Sequence[Array]) -> StepResult:
        """`step` in `parts` pieces, between which the ranks run other steps; one at a time goes like that.

        Raises:
            NotReadyError: the group takes no steps now, or has restarted since the step began.
            StepError, GroupError: see `step`.
        """
        async with self._one_in_parts:
            size = self._size(inputs)
            timeout_s = self._pace.limits(size, self.step_timeout_s).answer_s
            restarts, parts = self.lifecycle.restarts, [await self.step(inputs, timeout_s, Kind.BEGIN)]
            while len(parts) < self.parts:
                if self.lifecycle.restarts != restarts:
                    raise NotReadyError("the group has restarted, and knows nothing of a step that had begun")
                parts.append(await self.step((), timeout_s, Kind.NEXT))
            whole = StepResult.of_parts(parts[-1].outputs, parts)
            self._pace.measure(size, whole.total_s)
            return whole

    def _size(self, inputs: Sequence[Array]) -> int:
        """Tokens, with padding where that is computed."""
        return int(inputs[1].sum() if self.packs_rows else inputs[1].size)

    async def _resolve(self) -> None:
        topology = self.executor.topology
        COPIED.set(self._copied)
        found = self._found
        if found is None:
            found = await asyncio.to_thread(recall_or_find, self._model, topology)
        self._resolution = await resolve(found, self._model, topology, self._out)
        if self._resolution.artifact is not None:
            self.artifact_loads[self._resolution.source] += 1

    @property
    def _must_trace(self) -> bool:
        return self._resolution.artifact is None

    async def _prepare(self) -> None:
        if self._resolution.artifact is None:
            await self._trace_phase(self._trace)
        if self._topology.tracing:
            return
        try:
            self.packs_rows, self.parts = await self._phase("load", self.executor.load(self.artifact))
        except ArtifactError as e:
            if self._resolution.task is None and self._resolution.note is None:
                raise
            log.warning("%s; tracing it again", e)
            self._resolution.discard()
            if self._resolution.task is None:  # it was remembered
                found = await asyncio.to_thread(recall_or_find, self._model, self._topology)
                self._resolution = await resolve(found, self._model, self._topology)
            self._resolution = Resolution(None, self._resolution.task, damaged=True)
            await self._trace_phase(self._trace)
            self.packs_rows, self.parts = await self._phase("load", self.executor.load(self.artifact))
        await self._phase("check", self._check())
        await self._phase("warm up", self._warm_up())

    def _reported(self, number: int, name: str, note: str, ended: float | None = None) -> None:
        """See `Group`; what was copied from a store meanwhile is a span of its own, ``fetch``."""
        copied, self._copied = self._copied, []
        super()._reported(number, name, note, copied[0].started if copied else ended)
        for each in copied:
            super()._reported(0, "fetch", f"{each.size_bytes / 1e6:.1f} MB from {each.url}", each.ended)

    def _note(self, phase: str) -> str:
        if phase == "resolve":
            artifact = self._resolution.artifact
            return f"traced before: {artifact.directory}" if artifact else "not traced yet"
        return f"difference {self.parity:.1e}" if phase == "check" else super()._note(phase)

    @property
    def _expected_reports(self) -> int:
        task = self._resolution.task
        return task.programs if task is not None else 0

    async def _trace(self) -> None:
        self.traced, before = True, self.artifact_loads["traced"]
        self._resolution = await make_artifact(self._resolution, self._trace_shards)
        if self.artifact_loads["traced"] == before:
            self.artifact_loads["another"] += 1

    async def _trace_shards(self, task: TraceTask, directory: Path) -> Traced:
        checkpoint, length = task.checkpoint, task.model.max_length
        jobs = [
            ShardJob(checkpoint, task.dtype, length, task.buckets, directory / rank_folder(rank), task.typed)
            for rank in range(self.tp)
        ]
        records = await self.executor.trace(jobs)
        self.artifact_loads["traced"] += 1
        return Traced(records, await self.executor.make_canary(checkpoint, length))

    @property
    def canary_steps(self) -> int:
        """How many steps the canary has."""
        return len(self._canary)

    async def check_again(self, number: int) -> None:
        """Have the ranks answer a step of the canary again, and fail the group if it no longer does so as it should.

        Logits must stay as close to the unsharded model's as their dtype explains, which is seen at once. And a group
        that gave the same bits twice at its start must give them still: so smaller changes are seen too. One that does
        not come again is only logged.

        Args:
            number: of the step, from 0.

        Raises:
            ParityError: it does not; the supervisor restarts the group from its artifact, whose files are checked.
            GroupError: the group failed for another reason, or takes no steps now.
        """
        step, dtype = self._canary[number], self.artifact.manifest.dtype
        for attempt in ("first", "second"):
            logits = await self._answer_again(step.inputs)
            self._seen(difference(step.reference, logits))
            if not self.canary_difference <= TOLERANCE[dtype]:  # also true of NaN
                break
            if not step.repeatable or np.array_equal(logits, step.answer):
                if attempt == "second":
                    log.warning("the canary's logits were not those of the start, and then were again: a passing fault")
                return
        self.canary_failures += 1
        error = ParityError(
            "the group no longer gives the answers of its start, the canary's logits differ by "
            f"{difference(step.answer, logits):.2e}: a weight has changed in memory or a core computes wrongly; the "
            "group is started again from its artifact"
        )
        self._fail(error)
        raise error

    async def _answer_again(self, inputs: Sequence[Array]) -> Array:
        """The logits of a step of the canary; not a `step`, for none of those that restarts are counted by."""
        self.lifecycle.check_ready()
        try:
            logits = (await self._run(inputs)).logits
        except StepError as e:
            error = RankError(f"every rank fails in the canary: {e}")
            self._fail(error)
            raise error from e
        self.lifecycle.check_ready()  # by now it may restart for another reason
        return logits

    async def _check(self) -> None:
        manifest, differences, steps = self.artifact.manifest, [], []
        try:
            for inputs, reference in canary_steps(manifest.canary, manifest.model.pad_id):
                logits = (await self._run(inputs)).logits
                differences.append(check_logits(reference, logits, manifest.dtype))
                again = (await self._run(inputs)).logits
                steps.append(_CanaryStep(inputs, reference, logits, np.array_equal(logits, again)))
        except ParityError:
            # While another layout may follow it is not the artifact that is in doubt.
            if self.executor.topology.fallback is None:
                self._resolution.discard()
            raise
        self.parity, self._canary = max(differences), steps
        self._seen(self.parity)

    def _seen(self, difference: float) -> None:
        self.canary_difference, self.canary_at = difference, time.monotonic()

    async def _prove(self) -> None:
        step = self._canary[0]
        check_logits(step.reference, (await self._run(step.inputs)).logits, self.artifact.manifest.dtype)

    async def _warm_up(self) -> None:
        platform, longest = self.executor.topology.platform, self.artifact.manifest.model.max_length
        for batch, length in self.buckets or platform.warm_up_shapes(longest):
            ids = np.full((batch, length), 2, dtype=np.int64)
            await self._run([ids, np.ones_like(ids), np.zeros_like(ids)])
