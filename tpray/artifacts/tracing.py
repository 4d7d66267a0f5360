"""Make an artifact once: one traces, the others wait for what it makes.

On one machine a lock decides, which the kernel frees on a crash; among the machines of a store, a claim there.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tpray.artifacts.folder import MODEL_DIR, Artifact, copy_model_files
from tpray.artifacts.manifest import Manifest, RankRecord, machine, now, versions, write_manifest
from tpray.artifacts.resolve import Resolution, TraceTask, check_padding
from tpray.artifacts.store import SharedStore
from tpray.errors import StoreError
from tpray.parallel_layers.tasks import TOKEN
from tpray.runtime.records import INPUT_NAMES, Canary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """What the ranks made: a record of each, in their order, and the unsharded model's answer to a fixed input."""

    ranks: Sequence[RankRecord]
    canary: Canary


Tracer = Callable[[TraceTask, Path], Awaitable[Traced]]
"""Has every rank trace its shard into its folder below a directory."""


async def make_artifact(resolution: Resolution, tracer: Tracer) -> Resolution:
    """Trace what `resolve` did not find, or what was damaged, unless another group makes it meanwhile.

    Raises:
        TprayError: what ``tracer`` raised; no partial artifact stays.
    """
    task = resolution.task
    assert task is not None, "an artifact that the user named is not traced"
    task.directory.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(task.directory.parent / f".{task.directory.name}.lock"):
        # Another group may have traced the same model while this one waited for the lock.
        other = None if task.kept_by_user else task.open()
        if other is not None:
            return replace(resolution, artifact=other)
        if task.store is None:
            return replace(resolution, artifact=await _trace(task, tracer))
        return await _make_for_all(resolution, task, task.store, tracer)


async def _make_for_all(resolution: Resolution, task: TraceTask, store: SharedStore, tracer: Tracer) -> Resolution:
    artifact, url = None, store.url_of(task.key)
    try:
        async with store.claim(task.key) as claim:
            if not task.kept_by_user and not resolution.damaged:
                await asyncio.to_thread(store.fetch, task.key, task.directory)
                if (other := task.open()) is not None:
                    return replace(resolution, artifact=other, url=url)
            artifact = await _trace(task, tracer)
            if resolution.damaged or not await asyncio.to_thread(store.has, task.key):
                if claim.lost:
                    return replace(resolution, artifact=artifact)
                await asyncio.to_thread(store.publish, artifact.directory, task.key)
            return replace(resolution, artifact=artifact, url=url, damaged=False)
    except StoreError as e:
        log.warning("%s; this group does without it", e)
    return replace(resolution, artifact=artifact or await _trace(task, tracer))


async def _trace(task: TraceTask, tracer: Tracer) -> Artifact:
    topology = task.topology
    family, lnc = topology.compiled_for
    staging = task.directory.parent / f".{task.directory.name}.tracing"
    shutil.rmtree(staging, ignore_errors=True)  # of a tracer that crashed: the lock is ours
    try:
        model_files = copy_model_files(task.model_files, staging / MODEL_DIR)
        traced = await tracer(task, staging)
        reads_padding = traced.canary.reads_padding
        rows, of_tokens = ("batch", "sequence"), task.model.task == TOKEN
        check_padding(task.buckets, task.checkpoint, reads_padding)
        manifest = Manifest(
            created=now(),
            versions=versions(topology.runtime),
            machine=machine(),
            model=task.model.model_copy(update={"reads_padding": reads_padding}),
            runtime=topology.runtime,
            instance_family=family,
            lnc=lnc,
            tp=topology.tp,
            dtype=task.dtype,
            buckets=task.buckets,
            shapes=dict.fromkeys(INPUT_NAMES, rows) | {"logits": (*(rows if of_tokens else rows[:1]), "labels")},
            model_files=model_files,
            ranks=tuple(traced.ranks),
            canary=traced.canary,
        )
        write_manifest(staging, manifest)
        shutil.rmtree(task.directory, ignore_errors=True)
        staging.rename(task.directory)
        task.remember()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Artifact(task.directory, manifest)


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold an exclusive lock on ``path`` without blocking the event loop."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.2)
        yield
    finally:
        os.close(fd)
