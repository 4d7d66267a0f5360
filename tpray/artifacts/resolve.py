"""From what the user named to an artifact, or to what must be traced.

`locate` finds the files, on the Hub if need be, or an artifact; it needs neither transformers nor torch, and what comes
next need not be in the same process. `check` refuses what cannot work, `describe` says what is to be traced. `resolve`
then looks for the artifact that was traced before, in this machine's cache and in the store that machines share.

Artifacts are kept under ``<cache>/artifacts/<key>``; see `key`: the same model, degree, dtype, runtime and versions are
traced once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from tpray.artifacts import memo
from tpray.artifacts.folder import Artifact, is_artifact
from tpray.artifacts.key import cache_key
from tpray.artifacts.manifest import MANIFEST_FILE, Manifest, ModelRecord, check_cores
from tpray.artifacts.signature import check_signature
from tpray.artifacts.sizes import bytes_in, check_disk, check_memory
from tpray.artifacts.store import SharedStore, directory_of
from tpray.chat import own_template, read_template
from tpray.config import AUTO, DtypeName, ModelConfig, cache_dir, local_directory
from tpray.errors import ArtifactError, ConfigError, StoreError
from tpray.parallel_layers.checkpoint import Checkpoint, find_checkpoint
from tpray.parallel_layers.plan import Plan, read_plan
from tpray.parallel_layers.tasks import task_of
from tpray.platforms.base import Platform
from tpray.platforms.topology import Topology
from tpray.runtime.buckets import Bucket
from tpray.tokenizer import takes_types

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceTask:
    """What is to be traced, and where the artifact goes. It says all that transformers was asked of the model.

    model: for the manifest; whether it reads padding only a trace can tell for certain. model_files: configuration and
    tokenizer, by the names that they get. typed: whether the tokenizer gives token types. directory: of the artifact.
    kept_by_user: it is a folder that the user named, and not in the cache. store: where other machines look for it,
    under ``key``. note: where it is remembered; see `memo`.
    """

    checkpoint: Checkpoint
    model: ModelRecord
    model_files: dict[str, Path]
    typed: bool
    topology: Topology
    dtype: str
    buckets: tuple[Bucket, ...]
    key: str
    directory: Path
    kept_by_user: bool = False
    store: SharedStore | None = None
    note: Path | None = None

    @property
    def programs(self) -> int:
        """How many programs all ranks trace together, where that is known: one for each bucket."""
        return self.topology.tp * len(self.buckets)

    def open(self) -> Artifact | None:
        """The artifact as it is in its directory; None if it is not there, or damaged, and then it is thrown away."""
        if not self.directory.exists():
            return None
        try:
            return Artifact.open(self.directory)
        except ArtifactError as e:
            log.warning("%s; it will be traced again", e)
            self.discard()
            return None

    def remember(self) -> None:
        """Note that the artifact is there, for the next start."""
        if self.note is not None:
            memo.remember(self.note, self.key)

    def discard(self) -> None:
        """Throw the artifact away, unless the user keeps it."""
        if not self.kept_by_user:
            shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True)
class Resolution:
    """What `resolve` has found.

    artifact: None, if it must be traced. task: how to trace it, or to trace it again; None for an artifact that the
    user named, or that was remembered. url: where the store has it. damaged: the store's copy is to be replaced.
    note: where it is remembered, if it was. source: of the artifact: named, cache or store.
    """

    artifact: Artifact | None = None
    task: TraceTask | None = None
    url: str | None = None
    damaged: bool = False
    note: Path | None = None
    source: str = "cache"

    def discard(self) -> None:
        """Throw the artifact away, unless a user keeps it."""
        if self.task is not None:
            self.task.discard()
        elif self.note is not None and self.artifact is not None:
            memo.forget(self.note)
            shutil.rmtree(self.artifact.directory, ignore_errors=True)


@dataclass(frozen=True)
class Remembered:
    """The artifact of a checkpoint whose files are as they were when it was last resolved; see `memo`."""

    artifact: Artifact
    note: Path


Found = Checkpoint | TraceTask | Artifact | Remembered
"""What a model was found as."""


def recall_or_find(model: ModelConfig, topology: Topology, out: Path | None = None) -> Found:
    """What the last start has found, without transformers and torch; if nothing is remembered, `find_model`."""
    found = locate(model, topology, out)
    if isinstance(found, Checkpoint):
        check(found, model, topology, out)
    return found


def locate(model: ModelConfig, topology: Topology, out: Path | None = None) -> Checkpoint | Artifact | Remembered:
    """`recall_or_find`, but a checkpoint is not checked: without transformers and torch."""
    directory = local_directory(model.source)
    plain = out is None and model.store is None and model.verify_key is None
    if plain and directory.is_dir() and not is_artifact(directory):
        own_plan = None if model.plan is None else read_plan(model.plan)
        note = _note(directory, own_plan, topology.platform.choose_dtype(model.dtype), model, topology)
        remembered = _recall(note)
        if remembered is not None:
            check_memory(remembered.artifact.manifest.weight_bytes, str(directory))
            return remembered
    return find_files(model, topology)


def find_model(model: ModelConfig, topology: Topology, out: Path | None = None) -> Checkpoint | Artifact:
    """Find the files of a model, downloading them if need be, and refuse what cannot work; no weight is read.

    Args:
        out: as for `resolve`.

    Raises:
        ModelNotFoundError: there is no such folder or model. CheckpointError: its files are not whole, or do not fit.
        UnsupportedModelError: no plan shards it as it is. DegreeError: not by this tp.
        ArtifactError: a traced folder is damaged. StoreError: the URL of an artifact cannot be reached now.
        ConfigError: dtype, buckets, plan, memory, disk or the runtime do not agree with it.
    """
    found = find_files(model, topology)
    if isinstance(found, Checkpoint):
        check(found, model, topology, out)
    return found


def find_files(model: ModelConfig, topology: Topology) -> Checkpoint | Artifact:
    """A model's files as they are, downloaded if need be; a checkpoint is not checked."""
    if model.store is not None:
        SharedStore(model.store)
    own_plan = None if model.plan is None else read_plan(model.plan)
    directory = directory_of(model.source)
    check_signature(directory, model.verify_key)
    if is_artifact(directory):
        if own_plan is not None:
            raise ConfigError(f"{directory} is traced already: a sharding plan is for a checkpoint")
        for name, given in (("chat template", model.chat_template), ("labels", model.classifier_from_token)):
            if given:
                raise ConfigError(
                    f"{directory} is traced already, and keeps its {name}: trace the model again with another"
                )
        if model.store is not None:
            raise ConfigError(f"{directory} is traced already: a store is for what is traced from a checkpoint")
        artifact = Artifact.open(directory)
        artifact.check_sizes()  # what is cheap to see is said before anything starts
        _check_agrees(artifact.manifest, model, topology)
        check_memory(artifact.manifest.weight_bytes, str(directory))
        return artifact
    found = find_checkpoint(directory if model.source is None else model.source, model.revision)
    words, template = model.classifier_from_token, own_template(model.chat_template)
    return replace(found, own_plan=own_plan, own_template=template, words=words)


def check(checkpoint: Checkpoint, model: ModelConfig, topology: Topology, out: Path | None = None) -> None:
    """Refuse a checkpoint that cannot be served here; see `find_model`."""
    check_model(checkpoint, model, topology)
    _check_room(checkpoint, model, topology, out)


def check_model(checkpoint: Checkpoint, model: ModelConfig, topology: Topology) -> None:
    """Refuse a checkpoint that cannot be served, however large the machine."""
    if checkpoint.own_plan is not None:
        from tpray.parallel_layers.shard import check_plan

        check_plan(checkpoint)
    checkpoint.check_classifier()
    checkpoint.plan.check_degree(checkpoint.config, topology.tp)
    topology.platform.check_model(checkpoint.config.model_type)
    _check_buckets(model, checkpoint, topology)


def _check_room(checkpoint: Checkpoint, model: ModelConfig, topology: Topology, out: Path | None) -> None:
    """Refuse a checkpoint that does not fit this machine, or whose weights are not whole."""
    needed = bytes_in(checkpoint, topology.platform.choose_dtype(model.dtype))
    check_memory(needed, checkpoint.source)
    if out is not None or not _was_traced(checkpoint):
        check_disk(needed, checkpoint.source, out or cache_dir())
        _check_weights(checkpoint)


def _check_weights(checkpoint: Checkpoint) -> None:
    from tpray.parallel_layers.loading import check_weights
    from tpray.parallel_layers.stock import empty_model

    check_weights(empty_model(checkpoint.config), checkpoint)


def _note(directory: Path, own_plan: Plan | None, dtype: str, model: ModelConfig, topology: Topology) -> Path:
    plan = None if own_plan is None else own_plan.to_json()
    template = None if model.chat_template is None else read_template(model.chat_template)
    own = plan, template, list(model.classifier_from_token)
    return memo.note_path(directory, own, dtype, model.buckets, topology)


def _recall(note: Path) -> Remembered | None:
    key = memo.recall(note)
    if key is None:
        return None
    try:
        return Remembered(Artifact.open(cache_dir() / "artifacts" / key), note)
    except ArtifactError:  # gone or damaged: what it was made from is looked at again
        memo.forget(note)
        return None


def _was_traced(checkpoint: Checkpoint) -> bool:
    """Whether an artifact in the cache names this checkpoint: its weights fitted then, and `resolve` looks again.

    `check_weights` would cost a second at every start, for transformers imports the model's code.
    """
    for path in (cache_dir() / "artifacts").glob(f"*/{MANIFEST_FILE}"):
        try:
            if json.loads(path.read_bytes())["model"]["source"] == checkpoint.source:
                return True
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or being written
            continue
    return False


async def resolve(found: Found, model: ModelConfig, topology: Topology, out: Path | None = None) -> Resolution:
    """The artifact of a model, or what must be traced.

    Args:
        found: what `find_model` has found for ``model`` and ``topology``.
        out: the folder that the user wants the artifact in, instead of the cache; it is traced anew.
    """
    if isinstance(found, Artifact):
        return Resolution(found, source="named")
    if isinstance(found, Remembered):
        return Resolution(found.artifact, note=found.note)
    task = found
    if isinstance(task, Checkpoint):
        task = await asyncio.to_thread(describe, task, model, topology, out)
    artifact = None if task.kept_by_user else task.open()
    if artifact is not None:
        task.remember()
    if task.kept_by_user or task.store is None:
        return Resolution(artifact, task)
    in_store, damaged, source = False, False, "cache" if artifact else "store"
    try:
        if artifact is not None:
            in_store = await _share(artifact, task.store, task.key)
        else:
            in_store = await asyncio.to_thread(task.store.fetch, task.key, task.directory)
            artifact = task.open()
            damaged = in_store and artifact is None
    except StoreError as e:
        log.warning("%s; this group does without it", e)
    return Resolution(artifact, task, task.store.url_of(task.key) if in_store else None, damaged, source=source)


def describe(checkpoint: Checkpoint, model: ModelConfig, topology: Topology, out: Path | None = None) -> TraceTask:
    """What is to be traced, if it was not before, of a checkpoint that was `check`ed."""
    from tpray.parallel_layers.shard import count_token_types
    from tpray.parallel_layers.stock import empty_model

    dtype = topology.platform.choose_dtype(model.dtype)
    # Before any file is read: one that changes meanwhile is not remembered as it then is.
    elsewhere = {path.parent for path in checkpoint.weight_files.values()} - {checkpoint.directory}
    kept = out is not None or model.store is not None or checkpoint.revision is not None or bool(elsewhere)
    note = None if kept else _note(checkpoint.directory, checkpoint.own_plan, dtype, model, topology)
    limit = checkpoint.plan.max_length(checkpoint.config)
    named = model.buckets or topology.platform.default_buckets(limit)
    buckets = tuple(sorted({Bucket(*shape) for shape in named}))
    key = cache_key(checkpoint, topology, dtype, buckets)
    config, typed = checkpoint.config, takes_types(checkpoint.tokenizer)
    record = ModelRecord(
        source=checkpoint.source,
        revision=checkpoint.revision,
        digest=checkpoint.digest,
        model_type=config.model_type,
        task=task_of(config),
        max_length=max((bucket.length for bucket in buckets), default=limit),
        vocab_size=config.vocab_size,
        token_types=count_token_types(empty_model(config), typed),
        labels=checkpoint.labels,
        problem_type=config.problem_type,
        pad_id=checkpoint.pad_id,
        plan=checkpoint.plan.to_json(),
    )
    task = TraceTask(
        checkpoint=checkpoint,
        model=record,
        model_files=checkpoint.model_files,
        typed=typed,
        topology=topology,
        dtype=dtype,
        buckets=buckets,
        key=key,
        directory=out or cache_dir() / "artifacts" / key,
        kept_by_user=out is not None,
        store=SharedStore(model.store) if model.store else None,
        note=note,
    )
    if out is None and task.open() is None and _was_traced(checkpoint):  # else `check` has looked at them
        _check_weights(checkpoint)
    return task


async def _share(artifact: Artifact, store: SharedStore, key: str) -> bool:
    """Put what this machine traced before it knew the store there, unless another one did; whether it is there."""
    if not await asyncio.to_thread(store.has, key):
        async with store.claim(key, wait=False) as claim:
            if claim.lost:  # somebody traces it, and will put it there
                return False
            await asyncio.to_thread(store.publish, artifact.directory, key)
    return True


def check_padding(buckets: Sequence[object], checkpoint: Checkpoint, reads_padding: bool) -> None:
    """Raise ConfigError for buckets of a model that reads padding: its plan says so, or the trace has found it."""
    if buckets and reads_padding:
        raise ConfigError(
            f"{checkpoint.source} reads padding, so that its rows cannot be padded to buckets: serve it with "
            "--runtime cpu, and name none"
        )


def _check_buckets(model: ModelConfig, checkpoint: Checkpoint, topology: Topology) -> None:
    longest = max((length for _, length in model.buckets), default=0)
    limit = checkpoint.plan.max_length(checkpoint.config)
    if longest > limit:
        raise ConfigError(f"a bucket of {longest} tokens is longer than the {limit} that {checkpoint.source} takes")
    buckets = model.buckets or topology.platform.default_buckets(limit)
    check_padding(buckets, checkpoint, checkpoint.plan.reads_padding or checkpoint.mixes_lengths)


def check_dtype(manifest: Manifest, platform: Platform, name: str) -> None:
    """Refuse an artifact whose dtype these cores do not compute in: they would do so wrongly, or slowly.

    Raises:
        ConfigError: with the dtypes that would do.
    """
    try:
        platform.choose_dtype(cast(DtypeName, manifest.dtype))
    except ConfigError as e:
        raise ConfigError(f"{name} was traced in {manifest.dtype}: {e}, and trace the model again") from e


def _check_agrees(manifest: Manifest, model: ModelConfig, topology: Topology) -> None:
    name = f"the artifact {model.source}"
    if manifest.tp != topology.tp:
        raise ConfigError(
            f"{name} was traced for tp {manifest.tp}, not {topology.tp}: use --tp {manifest.tp}, or trace the model "
            "again"
        )
    if model.dtype not in (AUTO, manifest.dtype):
        raise ConfigError(f"{name} was traced in {manifest.dtype}, not {model.dtype}")
    if topology.runtime != manifest.runtime:
        raise ConfigError(f"{name} was traced for the runtime {manifest.runtime}")
    check_dtype(manifest, topology.platform, name)
    check_cores(manifest, topology, name)
    if manifest.lnc is not None and topology.lnc is None:
        raise ConfigError(
            f"{name} was compiled for logical NeuronCores of {manifest.lnc}: use --lnc {manifest.lnc} (lnc in a config "
            "file)"
        )
