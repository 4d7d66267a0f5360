"""What a group serves, and the artifacts that were traced for it.

Traced artifacts are kept under ``<cache>/artifacts/<key>``, where the key is a digest of everything that
shapes a program (`runtime.artifact.cache_key`): the same model, degree, dtype, runtime and versions are traced
once. A lock lets one group trace while others wait for what it makes; the kernel frees it on a crash. With a store
(`remote.SharedStore`), a URL that machines share, the same holds for all of them.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpray.config import DEMO_DIR, InstanceFamily, ModelConfig, ParallelConfig, RuntimeName, cache_dir
from tpray.errors import ArtifactError, ConfigError, StoreError
from tpray.group.cores import check_neuron_degree
from tpray.group.remote import SharedStore, fetch, is_url
from tpray.parallel_layers.checkpoint import Checkpoint, resolve
from tpray.parallel_layers.plan import read_plan
from tpray.parallel_layers.shard import check_plan
from tpray.runtime import artifact as artifacts
from tpray.runtime.artifact import Artifact, Manifest, ModelRecord
from tpray.runtime.base import INPUT_NAMES, Runtime, runtime_for
from tpray.runtime.buckets import Bucket
from tpray.runtime.neuron_env import STACKS, detect, instance_family

if TYPE_CHECKING:
    from tpray.group.ranks import Ranks

log = logging.getLogger("tpray.group.store")


COMPILER_BYTES = 8 << 30
"""Memory that one rank's compiler is given. A guess on the safe side: Neuron publishes no figure, and users ran out
of memory with all ranks at once (aws-neuron-sdk, issues 706 and 1014)."""


@dataclass(frozen=True)
class Source:
    """What to serve and how it is split.

    out: keep the artifact here instead of in the cache. instance_family, lnc: of the NeuronCores to compile for.
    """

    model: ModelConfig
    tp: int
    runtime: RuntimeName = "auto"
    out: Path | None = None
    instance_family: InstanceFamily | None = None
    lnc: int | None = None

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, out: Path | None = None) -> Source:
        """What a configuration says, with what this machine is where it does not say."""
        runtime = detect() if parallel.runtime == "auto" else parallel.runtime
        family = parallel.instance_family or instance_family() if runtime != "cpu" else None
        return cls(model, parallel.tp, runtime, out, family, parallel.lnc)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes to trace for; none: any."""
        return tuple(sorted({Bucket(*shape) for shape in self.model.buckets}))


def check_source(source: Source) -> Checkpoint | Artifact:
    """Everything that can be wrong with ``source`` and shows without reading a weight.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError, DegreeError, ConfigError, ArtifactError.
    """
    name = source.model.source
    check_neuron(source)
    if source.model.store is not None:
        SharedStore(source.model.store)
    own_plan = None if source.model.plan is None else read_plan(source.model.plan)
    if name is not None and is_url(name):
        name = str(fetch(name))
    directory = DEMO_DIR if name is None else Path(name).expanduser()
    if artifacts.is_artifact(directory):
        if own_plan is not None:
            raise ConfigError(f"{directory} is traced already: a sharding plan is for a checkpoint")
        if source.model.store is not None:
            raise ConfigError(
                f"{name} is traced already: a store is for what is traced from a checkpoint; leave it out"
            )
        found = Artifact.open(directory)
        _check_agrees(found.manifest, source)
        _check_memory(sum(r.sharded_bytes + r.replicated_bytes for r in found.manifest.ranks), str(directory))
        return found
    checkpoint = replace(resolve(directory if name is None else name, source.model.revision), own_plan=own_plan)
    if own_plan is not None:
        check_plan(checkpoint)
    checkpoint.check_classifier()
    checkpoint.plan.check_degree(checkpoint.config, source.tp)
    runtime_for(source.runtime).choose_dtype(source.model.dtype)
    _check_buckets(source, checkpoint)
    _check_memory(checkpoint.size_bytes, checkpoint.source)
    return checkpoint


def check_neuron(source: Source) -> None:
    """What cannot work on NeuronCores, if these are asked for, and shows without the model.

    Raises:
        DegreeError, ConfigError: the family has no such degree, or the runtime does not know its cores.
    """
    if source.runtime not in ("neuron", "neuron-xla"):
        return
    check_neuron_degree(source.tp, source.instance_family)
    if source.instance_family is not None and source.runtime not in (known := STACKS[source.instance_family]):
        raise ConfigError(
            f"the runtime {source.runtime} does not know {source.instance_family}'s cores: use --runtime {known[0]}"
        )


def _check_buckets(source: Source, checkpoint: Checkpoint) -> None:
    longest = max((bucket.length for bucket in source.buckets), default=0)
    limit = checkpoint.plan.max_length(checkpoint.config)
    if longest > limit:
        raise ConfigError(f"a bucket of {longest} tokens is longer than the {limit} that {checkpoint.source} takes")
    if source.buckets and checkpoint.plan.reads_padding:
        raise ConfigError(f"{checkpoint.source} reads padding, so that its rows cannot be padded to buckets: name none")


def _check_memory(needed: int, name: str) -> None:
    """Refuse what cannot fit: a group holds its weights once, all ranks together."""
    available = available_bytes()
    if needed > available:
        raise ConfigError(
            f"the weights of {name} are {needed / 2**30:.1f} GiB and this machine has {available / 2**30:.1f} GiB of "
            "memory available: free some, or use a larger machine"
        )


def available_bytes() -> int:
    """The memory that a new process may use without swapping: the system's, or less if a control group limits it.

    Source: MemAvailable of proc(5); memory.max and memory.current of the kernel's cgroup v2 documentation.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return free
    return min(free, limit - used)


def compilations(runtime: Runtime, tp: int) -> int:
    """How many of ``tp`` ranks trace at a time: all, unless their compilers would not fit the memory together."""
    if runtime.name == "cpu" or not runtime.compiles_alone:
        return tp
    return max(1, min(tp, available_bytes() // COMPILER_BYTES))


def _check_agrees(manifest: Manifest, source: Source) -> None:
    if manifest.tp != source.tp:
        raise ConfigError(
            f"the artifact {source.model.source} was traced for tp {manifest.tp}, not {source.tp}: use --tp "
            f"{manifest.tp}, or trace the model again"
        )
    if source.model.dtype not in ("auto", manifest.dtype):
        raise ConfigError(
            f"the artifact {source.model.source} was traced in {manifest.dtype}, not {source.model.dtype}"
        )
    if source.runtime not in ("auto", manifest.runtime):
        raise ConfigError(f"the artifact {source.model.source} was traced for the runtime {manifest.runtime}")
    for what, traced, asked in (
        ("instance family", manifest.instance_family, source.instance_family),
        ("logical NeuronCore size", manifest.lnc, source.lnc),
    ):
        if None not in (traced, asked) and traced != asked:
            raise ConfigError(
                f"the artifact {source.model.source} was compiled for the {what} {traced}, and this is {asked}: trace "
                "the model again for it"
            )
    if manifest.lnc is not None and source.lnc is None:
        raise ConfigError(
            f"the artifact {source.model.source} was compiled for logical NeuronCores of {manifest.lnc}: use --lnc "
            f"{manifest.lnc} (lnc in a config file)"
        )


class ArtifactStore:
    """Finds the artifact of one source, or has it traced."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._runtime = runtime_for(source.runtime)
        self._checkpoint: Checkpoint | None = None
        self._dtype = ""
        self._key = ""
        self._directory: Path | None = None
        self._shared = SharedStore(source.model.store) if source.model.store else None
        self._in_store = False
        self._damaged = False  # what was found: the store's copy is replaced and not fetched again

    @property
    def caches(self) -> bool:
        """Whether a damaged artifact can be traced again, because its checkpoint is at hand."""
        return self._checkpoint is not None

    async def find(self) -> Artifact | None:
        """The artifact, if it was traced already; None means that `trace` has to make it."""
        found = await asyncio.to_thread(check_source, self._source)
        if isinstance(found, Artifact):
            return found
        self._checkpoint = found
        self._dtype = self._runtime.choose_dtype(self._source.model.dtype)
        self._key = await asyncio.to_thread(
            artifacts.cache_key,
            found,
            self._source.tp,
            self._dtype,
            self._runtime.name,
            self._buckets(found),
            f"{self._source.instance_family} {self._source.lnc}",
        )  # reads every weight once
        self._directory = self._source.out or cache_dir() / "artifacts" / self._key
        if self._source.out is not None:
            return None
        found_here = self._open()
        try:
            if found_here is None:
                return await self._fetch()
            if self._shared is not None:
                await self._share(found_here, self._shared)
        except StoreError as e:
            log.warning("%s; this group does without it", e)
        return found_here

    @property
    def url(self) -> str | None:
        """Where the store has the artifact; None if it has not, or there is no store."""
        return self._shared.url_of(self._key) if self._shared is not None and self._in_store else None

    async def _share(self, artifact: Artifact, shared: SharedStore) -> None:
        """Put what this machine traced before it knew the store there, unless another one did."""
        if not await asyncio.to_thread(shared.has, self._key):
            async with shared.claim(self._key, wait=False) as claim:
                if claim.lost:  # somebody traces it, and will put it there
                    return
                await asyncio.to_thread(shared.publish, artifact.directory, self._key)
        self._in_store = True

    async def _fetch(self) -> Artifact | None:
        """What another machine has put into the store."""
        assert self._directory is not None, "find() says where"
        if self._shared is None or not await asyncio.to_thread(self._shared.fetch, self._key, self._directory):
            return None
        self._in_store = True
        return self._open()

    @property
    def programs(self) -> int:
        """How many programs each rank traces; 0 where there is one for any shape, or nothing to trace."""
        return len(self._buckets(self._checkpoint)) if self._checkpoint is not None else 0

    def _buckets(self, checkpoint: Checkpoint) -> tuple[Bucket, ...]:
        return self._source.buckets or self._runtime.default_buckets(checkpoint.plan.max_length(checkpoint.config))

    def _open(self) -> Artifact | None:
        assert self._directory is not None
        if not self._directory.exists():
            return None
        try:
            return Artifact.open(self._directory)
        except ArtifactError as e:
            log.warning("%s; it will be traced again", e)
            self.discard()
            return None

    def discard(self) -> None:
        """Throw the traced artifact away, here and, when it is traced anew, in the store; never a user's own."""
        self._damaged = True
        if self._directory is not None and self._source.out is None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def trace(self, ranks: Ranks) -> Artifact:
        """Have every rank trace its shard, and put the artifact together.

        Raises:
            TprayError: what a rank raised; no partial artifact stays.
        """
        assert self._directory is not None, "find() comes before trace()"
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        async with _locked(self._directory.parent / f".{self._directory.name}.lock"):
            # Another group may have traced the same model while this one waited for the lock.
            other = self._open() if self._source.out is None else None
            if other is not None:
                return other
            return await self._trace_for_all(ranks, self._shared) if self._shared else await self._trace(ranks)

    async def _trace_for_all(self, ranks: Ranks, shared: SharedStore) -> Artifact:
        traced = None
        try:
            async with shared.claim(self._key) as claim:
                other = await self._fetch() if self._source.out is None and not self._damaged else None
                if other is not None:
                    return other
                traced = await self._trace(ranks)
                if self._damaged or not await asyncio.to_thread(shared.has, self._key):
                    if claim.lost:
                        return traced
                    await asyncio.to_thread(shared.publish, traced.directory, self._key)
                self._in_store = True
        except StoreError as e:
            log.warning("%s; this group does without it", e)
        return traced or await self._trace(ranks)

    async def _trace(self, ranks: Ranks) -> Artifact:
        assert self._checkpoint is not None
        assert self._directory is not None
        checkpoint, config, directory = self._checkpoint, self._checkpoint.config, self._directory
        buckets = self._buckets(checkpoint)
        max_length = checkpoint.plan.max_length(config)
        if buckets:
            max_length = max(bucket.length for bucket in buckets)
        staging = directory.parent / f".{directory.name}.tracing"
        shutil.rmtree(staging, ignore_errors=True)  # of a tracer that crashed: the lock is ours
        try:
            model_files = artifacts.copy_model_files(checkpoint, staging / artifacts.MODEL_DIR)
            folders = [staging / f"rank_{rank:02d}" for rank in range(ranks.tp)]
            each = [(checkpoint, self._dtype, max_length, buckets, folder) for folder in folders]
            at_once = compilations(self._runtime, ranks.tp)
            log.info("%d of %d ranks trace at a time", at_once, ranks.tp)
            records = await ranks.call("trace", each=each, at_once=at_once)
            (canary,) = await ranks.call("make_canary", each=[(checkpoint, max_length)])
            manifest = Manifest(
                created=artifacts.now(),
                versions=artifacts.versions(self._runtime.name),
                machine=artifacts.machine(),
                model=ModelRecord(
                    source=checkpoint.source,
                    revision=checkpoint.revision,
                    digest=checkpoint.digest,
                    model_type=config.model_type,
                    max_length=max_length,
                    labels=tuple(config.id2label[i] for i in range(config.num_labels)),
                    problem_type=config.problem_type,
                    pad_id=config.pad_token_id or 0,
                    plan=checkpoint.plan.to_json(),
                ),
                runtime=self._runtime.name,
                instance_family=self._source.instance_family,
                lnc=self._source.lnc,
                tp=ranks.tp,
                dtype=self._dtype,
                buckets=buckets,
                shapes=dict.fromkeys(INPUT_NAMES, ("batch", "sequence")) | {"logits": ("batch", "labels")},
                model_files=model_files,
                ranks=tuple(records),
                canary=canary,
            )
            artifacts.write_manifest(staging, manifest)
            shutil.rmtree(directory, ignore_errors=True)
            staging.rename(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return Artifact(directory, manifest)


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
