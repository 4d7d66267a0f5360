"""A group: N ranks that are one classifier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from tpray.errors import ArtifactError, ParityError
from tpray.group.life import PhaseReport, RankGroup, StepResult
from tpray.group.ranks import Ranks
from tpray.group.store import ArtifactStore, Source
from tpray.group.wire import Array
from tpray.runtime.artifact import Artifact
from tpray.runtime.base import INPUT_NAMES, runtime_for
from tpray.runtime.buckets import Bucket, fitting, largest_batch, pad_to
from tpray.runtime.canary import check_canary

log = logging.getLogger("tpray.group")


class ShardGroup(RankGroup):
    """One tensor-parallel classifier, owned by the event loop that starts it.

    Args:
        source: what to serve; see `store.Source`.
        ranks, step_timeout_s, progress: as in `RankGroup`.
    """

    def __init__(
        self,
        source: Source,
        ranks: Ranks,
        step_timeout_s: float = 60.0,
        progress: Callable[[PhaseReport], None] | None = None,
    ) -> None:
        super().__init__(ranks, step_timeout_s, progress)
        self.source = source
        self.parity = float("nan")
        self.artifact: Artifact | None = None
        self.traced = False
        self.packs_rows = False
        self._store = ArtifactStore(source)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes that the program takes; none: any."""
        return self.artifact.manifest.buckets if self.artifact else ()

    @property
    def url(self) -> str | None:
        """Where the artifact is in the store that machines share; None without one."""
        return self._store.url

    async def step(self, inputs: Sequence[Array], timeout_s: float | None = None) -> StepResult:
        """See `RankGroup.step`; a program of fixed shapes is given its inputs in buckets, one after another.

        Raises:
            InputTooLongError: a row is longer than every bucket.
        """
        if self.artifact is None or not self.buckets:
            return await super().step(inputs, timeout_s)
        rows, length = inputs[0].shape
        size = largest_batch(self.buckets, length)
        logits, compute_s, total_s = [], 0.0, 0.0
        for start in range(0, rows, size):
            part = [array[start : start + size] for array in inputs]
            bucket = fitting(self.buckets, len(part[0]), length)
            assert bucket is not None, "largest_batch() found one"
            result = await super().step(pad_to(part, bucket, self.artifact.manifest.model.pad_id), timeout_s)
            logits.append(result.logits[: len(part[0])])
            compute_s, total_s = compute_s + result.compute_s, total_s + result.total_s
        return StepResult((np.concatenate(logits),), compute_s, total_s)

    async def _resolve(self) -> None:
        self.artifact = await self._store.find()

    async def _prepare(self) -> None:
        if self.artifact is None:
            self.artifact = await self._phase("trace", self._trace())
        try:
            packs = await self._phase("load", self.ranks.call("load", self.artifact))
        except ArtifactError as e:
            if not self._store.caches:
                raise
            log.warning("%s; tracing it again", e)
            self._store.discard()
            self.artifact = await self._phase("trace", self._trace())
            packs = await self._phase("load", self.ranks.call("load", self.artifact))
        self.packs_rows = all(packs)
        await self._phase("check", self._check())
        await self._phase("warm up", self._warm_up())

    def _note(self, phase: str) -> str:
        if phase == "resolve":
            return f"traced before: {self.artifact.directory}" if self.artifact else "not traced yet"
        return f"difference {self.parity:.1e}" if phase == "check" else super()._note(phase)

    def _parts(self) -> str:
        return f" of {self.ranks.tp * count} programs" if (count := self._store.programs) else ""

    async def _trace(self) -> Artifact:
        self.traced = True
        return await self._store.trace(self.ranks)

    async def _check(self) -> None:
        assert self.artifact is not None
        canary = self.artifact.manifest.canary
        result = await self.step([np.array(getattr(canary, name), dtype=np.int64) for name in INPUT_NAMES])
        import torch

        try:
            logits = torch.from_numpy(result.logits.copy())
            self.parity = check_canary(canary, logits, self.artifact.manifest.dtype)
        except ParityError:
            self._store.discard()
            raise

    async def _warm_up(self) -> None:
        assert self.artifact is not None
        manifest = self.artifact.manifest
        shapes = self.buckets or runtime_for(manifest.runtime).warm_up_shapes(manifest.model.max_length)
        for batch, length in shapes:
            ids = np.full((batch, length), 2, dtype=np.int64)
            await self.step([ids, np.ones_like(ids), np.zeros_like(ids)])
