"""A classifier without Serve: the same engine and group, used from a script or a notebook."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np

from tpray.config import (
    BatchConfig,
    DtypeName,
    InstanceFamily,
    ModelConfig,
    NeuronLayout,
    ParallelConfig,
    RuntimeName,
)
from tpray.errors import ConfigError
from tpray.group.blocking import LoopThread
from tpray.group.cores import usable_cores
from tpray.group.group import ShardGroup
from tpray.group.life import PhaseReport
from tpray.group.placement import Layout
from tpray.group.ranks import Ranks, RayRanks
from tpray.group.store import Source, check_source
from tpray.group.wire import Array
from tpray.runtime.base import INPUT_NAMES
from tpray.runtime.buckets import parse
from tpray.serving.engine import Answer, Engine
from tpray.serving.text import Item

T = TypeVar("T")


class LocalClassifier:
    """A group that answers this process; make one with `load`, end it with `close` or a ``with`` block."""

    def __init__(self, group: ShardGroup, batch: BatchConfig, owns_ray: bool = False) -> None:
        self._owns_ray = owns_ray
        self._loop = LoopThread("tpray-group")
        self._closed = False
        self._engine = Engine(group, batch)
        atexit.register(self.close)
        try:
            self._run(self._engine.start())
        except BaseException:
            self._end()
            raise

    @property
    def group(self) -> ShardGroup:
        """The group itself: its phases, ranks and artifact."""
        return self._engine.group

    @property
    def phases(self) -> list[PhaseReport]:
        """How long each start-up phase took."""
        return list(self.group.phases)

    def classify(self, inputs: Item | Sequence[Item], raw_scores: bool = False, truncate: bool = False) -> list[Any]:
        """Score every label, best first.

        Args:
            inputs: a text, a pair as a tuple, or a list of texts and pairs, of any length.
            raw_scores: logits instead of probabilities.
            truncate: cut texts that are longer than the model takes.

        Returns:
            ``[{"label", "score"}, ...]`` for one text or pair; a list of those for a list.

        Raises:
            InputError: something in ``inputs`` cannot be classified; nothing was.
            GroupError: the group failed and could not be brought back.
        """
        single = isinstance(inputs, (str, tuple))
        items: list[Item] = [inputs] if isinstance(inputs, (str, tuple)) else list(inputs)
        rows = list(self.classify_many(items, raw_scores, truncate)) if items else []
        return rows[0] if single else rows

    def classify_many(
        self, items: Iterable[Item], raw_scores: bool = False, truncate: bool = False
    ) -> Iterator[list[dict[str, Any]]]:
        """The same for an iterable that need not fit in memory: answers come in order, as they are ready."""
        size = self._engine.config.max_client_batch_size
        ahead: list[asyncio.Future[Answer]] = []
        part: list[Item] = []
        limit = max(1, self._engine.config.max_concurrent_requests // size - 1)

        def submit() -> None:
            work = self._engine.classify(list(part), raw_scores, truncate)
            ahead.append(asyncio.run_coroutine_threadsafe(work, self._loop.loop))  # type: ignore[arg-type]
            part.clear()

        def rows(answer: Answer) -> Iterator[list[dict[str, Any]]]:
            return ([{"label": s.label, "score": s.score} for s in scores] for scores in answer.scores)

        for item in items:
            part.append(item)
            if len(part) == size:
                submit()
            if len(ahead) > limit:
                yield from rows(ahead.pop(0).result())
        if part:
            submit()
        for future in ahead:
            yield from rows(future.result())

    def check(self, item: Item, truncate: bool = False) -> None:
        """Raise `InputError` if ``item`` cannot be classified."""
        self._engine.codec.encode([item], truncate)

    def logits(self, **inputs: Any) -> Array:
        """Run the program on token ids.

        Args:
            inputs: ``input_ids`` and, if need be, ``attention_mask`` and ``token_type_ids``, integers
                ``[B, S]``: what a transformers tokenizer returns, as tensors, arrays or lists.

        Returns:
            float32 ``[B, L]``.
        """
        if "input_ids" not in inputs or not set(inputs) <= set(INPUT_NAMES):
            raise ConfigError(f"logits() takes {', '.join(INPUT_NAMES)}, and needs the first of them")
        ids = np.asarray(inputs["input_ids"], dtype=np.int64)
        rest = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        given = {name: np.asarray(value, dtype=np.int64) for name, value in inputs.items()}
        arrays = rest | given
        if ids.ndim != 2 or any(array.shape != ids.shape for array in arrays.values()):
            raise ConfigError("logits() takes arrays of one shape [batch, sequence]")
        return self._run(self.group.step([arrays[name] for name in INPUT_NAMES])).logits

    def close(self) -> None:
        """Stop the group, and Ray if `load` started it. Safe to call twice."""
        if self._closed:
            return
        self._run(self._engine.stop())
        self._end()

    def _end(self) -> None:
        self._closed = True
        atexit.unregister(self.close)
        self._loop.stop()
        if self._owns_ray:
            from tpray.group.cluster import stop_ray

            stop_ray()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise ConfigError("this classifier was closed: load it again")
        return self._loop.run(work)

    def __enter__(self) -> LocalClassifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    model: str | Path | None = None,
    tp: int = 1,
    dtype: DtypeName = "auto",
    runtime: RuntimeName = "auto",
    cores: int | None = None,
    plan: Path | dict[str, Any] | None = None,
    buckets: str | Sequence[tuple[int, int]] = (),
    out: Path | None = None,
    progress: Any = None,
    ranks: Ranks | None = None,
    instance_family: InstanceFamily | None = None,
    neuron_layout: NeuronLayout = "process-per-rank",
    lnc: Literal[1, 2] | None = None,
    store: str | None = None,
) -> LocalClassifier:
    """Bring up one group on this machine, starting Ray here if there is none.

    Args:
        model: a Hub id, a checkpoint directory, an artifact directory or its URL; None is the embedded demo.
        tp: the tensor-parallel degree.
        dtype: what the shards compute in; ``auto`` is the fastest that the cores multiply natively.
        runtime: the kind of core.
        cores: cores per rank; the default shares this machine's out.
        plan: how to shard it, for an architecture that tpray's table lacks: a plan file, or what it holds.
        buckets: trace one program for each [batch, length] and no other, ``"8x32,8x128"``; the default takes any shape.
        out: keep the traced artifact in this directory instead of the cache.
        progress: called with a `PhaseReport` after each start-up phase.
        ranks: where the ranks come from, when they are not to be Ray actors.
        instance_family, neuron_layout, lnc: on NeuronCores; see `tpray.config.ParallelConfig`.
        store: URL of a folder that machines share: what one of them traced, the others fetch.

    Raises:
        TprayError: the model, the degree or the machine will not do; the message says what would.
    """
    shapes = parse(buckets) if isinstance(buckets, str) else tuple(buckets)
    named = None if model is None else str(model)
    parallel = ParallelConfig(
        tp=tp,
        cores_per_rank=cores,
        runtime=runtime,
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=lnc,
    )
    source = Source.of(ModelConfig(source=named, dtype=dtype, plan=plan, buckets=shapes, store=store), parallel, out)
    check_source(source)  # before anything is started
    owns_ray = False
    if ranks is None:
        from tpray.group.cluster import ensure_ray

        layout = Layout.of(parallel)
        owns_ray = ensure_ray(max(len(usable_cores()), tp * layout.threads))
        ranks = RayRanks(layout)
    group = ShardGroup(source, ranks, BatchConfig().step_timeout_s, progress)
    return LocalClassifier(group, BatchConfig(), owns_ray)
