"""A classifier without Serve: the same engine and group, used from a script or a notebook."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np

from tpray.artifacts.resolve import recall_or_find
from tpray.artifacts.settle import cheapest_degree
from tpray.config import AUTO, BatchConfig, DtypeName, InstanceFamily, ModelConfig, NeuronLayout, ParallelConfig
from tpray.errors import ConfigError, ItemError
from tpray.group.classifier import ClassifierGroup
from tpray.group.executor import Executor
from tpray.group.loop_thread import LoopThread
from tpray.group.phases import PhaseReport
from tpray.group.wire import Array
from tpray.platforms.cores import core_count
from tpray.platforms.topology import Topology
from tpray.runtime.buckets import parse
from tpray.runtime.records import INPUT_NAMES
from tpray.serving.answers import Answer, Tagged, rendered
from tpray.serving.chunked_items import encode_chunks
from tpray.serving.chunks import Chunks
from tpray.serving.engine import Engine
from tpray.serving.entities import Strategy
from tpray.serving.many import Room, in_parts, raised, wait_for
from tpray.serving.scores import OWN, Activation, Ranked, Scoring
from tpray.serving.tagging import Tagging, tag
from tpray.serving.typed import Entity, LabelScore, Pair, RankedDocument, Texts, in_order
from tpray.tokenizer import Item, as_item, as_items

T = TypeVar("T")
Asked = TypeVar("Asked")


class LocalClassifier:
    """A group that answers this process; make one with `load`, end it with `close` or a ``with`` block.

    Any thread may use it.
    """

    def __init__(self, group: ClassifierGroup, batch: BatchConfig, owns_ray: bool = False) -> None:
        self._owns_ray = owns_ray
        self._loop = LoopThread("tpray-group")
        self._closing = threading.Lock()
        self._engine, self._room = Engine(group, batch), Room(batch.max_concurrent_requests)
        atexit.register(self.close)
        try:
            self._loop.run(self._engine.start())
        except BaseException:
            self._end()
            raise

    @property
    def group(self) -> ClassifierGroup:
        """The group itself: its phases, ranks and artifact."""
        return self._engine.group

    @property
    def phases(self) -> list[PhaseReport]:
        """How long each start-up phase took."""
        return list(self.group.phases)

    @property
    def task(self) -> str:
        """What the model does; see `tpray.parallel_layers.tasks`."""
        return self.group.artifact.manifest.model.task

    # fmt: off
    @overload
    def classify(  # type: ignore[overload-overlap]  # a text is no batch of its letters
        self, inputs: str | Pair | Mapping[str, Any], raw_scores: bool = ..., truncate: bool = ..., chunks: Any = ...,
        activation: Activation | None = ..., top_k: int | None = ...,
    ) -> list[LabelScore]: ...
    @overload
    def classify(
        self, inputs: Texts, raw_scores: bool = ..., truncate: bool = ..., chunks: Any = ...,
        activation: Activation | None = ..., top_k: int | None = ...,
    ) -> list[list[LabelScore]]: ...
    @overload
    def classify(
        self, inputs: Any, raw_scores: bool = ..., truncate: bool = ..., chunks: Any = ...,
        activation: Activation | None = ..., top_k: int | None = ...,
    ) -> list[Any]: ...
    # fmt: on
    def classify(
        self,
        inputs: Any,
        raw_scores: bool = False,
        truncate: bool = False,
        chunks: Any = None,
        activation: Activation | None = None,
        top_k: int | None = None,
    ) -> list[Any]:
        """Score every label, best first.

        Args:
            inputs: a text, a pair as a tuple, a conversation (``[{"role", "content"}, ...]`` or ``{"messages":
                [...]}``), or a list of these, of any length.
            raw_scores: logits instead of probabilities.
            truncate: cut texts that are longer than the model takes.
            chunks: read them in overlapping chunks, and aggregate their scores: True, or an object with fields of
                `tpray.serving.chunks.Chunks`, such as ``{"stride": 64, "aggregate": "mean"}``.
            activation: softmax, sigmoid, or none for logits, in place of the checkpoint's own.
            top_k: give so many labels, the best; the default is all.

        Returns:
            ``[{"label", "score"}, ...]`` for one item; a list of those for a list.

        Raises:
            InputError: something in ``inputs`` cannot be classified; nothing was.
            GroupError: the group failed and could not be brought back, or was closed meanwhile.
        """
        items, single = as_items(inputs)
        scoring = Scoring.of(raw_scores, activation, top_k)
        rows = list(raised(self.classify_each(items, scoring, truncate, chunks))) if items else []
        return rows[0] if single else rows

    # fmt: off
    @overload
    def classify_tokens(
        self, texts: str, aggregation_strategy: Strategy = ..., ignore_labels: Sequence[str] = ...,
        raw_scores: bool = ..., truncate: bool = ...,
    ) -> list[Entity]: ...
    @overload
    def classify_tokens(
        self, texts: list[str] | tuple[str, ...], aggregation_strategy: Strategy = ...,
        ignore_labels: Sequence[str] = ..., raw_scores: bool = ..., truncate: bool = ...,
    ) -> list[list[Entity]]: ...
    # fmt: on
    def classify_tokens(
        self,
        texts: str | Sequence[str],
        aggregation_strategy: Strategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        raw_scores: bool = False,
        truncate: bool = False,
    ) -> list[Any]:
        """Label the tokens of a text, or of a list of them, as transformers' token-classification pipeline does.

        Args:
            aggregation_strategy: which tokens are one entity; see `tpray.serving.entities.Strategy`.
            ignore_labels: entities of these are left out.
            raw_scores: give each token's ``logits`` too, in the order of the labels; of the strategy ``none``.
            truncate: cut texts that are longer than the model takes.

        Returns:
            ``[{"entity", "score", "index", "word", "start", "end"}, ...]`` for one text, with ``entity_group`` in place
            of ``entity`` and ``index`` where tokens are one entity; a list of those for a list.

        Raises:
            InputError: the model labels no tokens, or something that was sent cannot be labelled; nothing was.
            GroupError: the group failed and could not be brought back, or was closed meanwhile.
        """
        single = isinstance(texts, str)
        how = Tagging(aggregation_strategy, ignore_labels, raw_scores, truncate)
        answers = list(raised(self.tag_each([texts] if isinstance(texts, str) else texts, how)))
        return answers[0] if single else answers

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        return_documents: bool = False,
        raw_scores: bool = False,
        truncate: bool = True,
        chunks: Any = None,
    ) -> list[RankedDocument]:
        """Score how relevant each document is for a query; see `Engine.rerank`, and for ``chunks`` `classify`.

        There may be any number of documents.

        Returns:
            ``[{"index", "score"}, ...]``, the best first, each with its ``document`` if that was asked for.

        Raises:
            InputError: the model is no reranker, or something that was sent cannot be scored.
            GroupError: the group failed and could not be brought back, or was closed meanwhile.
        """
        documents, ranked = list(documents), []
        scoring = Scoring.of(raw_scores, top_k=top_n)
        read, rows = self._rows_of(chunks)
        size = max(1, self._engine.config.max_concurrent_requests // rows)
        for start in range(0, max(1, len(documents)), size):
            part = documents[start : start + size]
            try:
                ask = partial(self._engine.rerank, query, part, scoring, truncate, chunks=read)
                ranking = wait_for(self._submit(self._with_room(len(part) * rows, ask)))
            except ItemError as e:
                raise type(e)(e.message, None if e.item is None else e.item + start) from e
            ranked += [Ranked(each.index + start, each.score) for each in ranking.documents]
        ranked.sort(key=lambda each: (-each.score, each.index))
        return cast(list[RankedDocument], rendered(scoring.chosen(ranked), documents if return_documents else None))

    def score(
        self, query: str, documents: Sequence[str], raw_scores: bool = False, truncate: bool = True, chunks: Any = None
    ) -> list[float]:
        """How relevant each document is for a query, in the order of the documents; see `rerank`."""
        return in_order(self.rerank(query, documents, raw_scores=raw_scores, truncate=truncate, chunks=chunks))

    @staticmethod
    def _rows_of(chunks: Any) -> tuple[Chunks | None, int]:
        """How items are read, and how many rows one may be."""
        read = Chunks.of(chunks)
        return read, 1 if read is None else read.max_chunks

    async def _with_room(self, rows: int, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait until the engine takes so many rows, and ask."""
        async with self._room.taken(rows):
            return await ask()

    def classify_many(
        self, items: Iterable[Any], raw_scores: bool = False, truncate: bool = False, chunks: Any = None
    ) -> Iterator[list[dict[str, Any]]]:
        """The same for an iterable that need not fit in memory: answers come in order, as they are ready."""
        known = (as_item(item, number) for number, item in enumerate(items))
        yield from raised(self.classify_each(known, Scoring.of(raw_scores), truncate, chunks))

    def classify_each(
        self, items: Iterable[Item], scoring: Scoring = OWN, truncate: bool = False, chunks: Any = None
    ) -> Iterator[list[dict[str, Any]] | ItemError]:
        """The same, with an item's error in the place of its answer, so that the others are answered."""
        read, rows = self._rows_of(chunks)
        return self._each(items, lambda own: self._engine.classify(own, scoring, truncate, chunks=read), rows)

    def tag_each(self, texts: Iterable[str], how: Tagging) -> Iterator[list[dict[str, Any]] | ItemError]:
        """The entities of each text, or its error in their place; where the model is a classifier of tokens."""
        return self._each(texts, lambda own: tag(self._engine, own, how), 1)

    def _each(
        self, items: Iterable[Asked], ask: Callable[[list[Asked]], Coroutine[Any, Any, Answer | Tagged]], rows: int
    ) -> Iterator[list[dict[str, Any]] | ItemError]:
        """rows: how many one item may be."""
        most = max(1, self._engine.config.max_concurrent_requests // rows)
        size = max(1, min(self._engine.config.max_client_batch_size, most // 2))

        def submit(part: list[Asked]) -> Future[Answer | Tagged]:
            return self._submit(self._with_room(len(part) * rows, lambda: ask(part)))

        return in_parts(items, submit, size, max(1, most // size - 1))

    def check(self, item: Item, truncate: bool = False, chunks: Chunks | None = None) -> None:
        """Raise `InputError` if ``item`` cannot be classified."""
        if chunks is None:
            self._engine.codec.encode([item], truncate)
        else:
            encode_chunks(self._engine.codec, [item], chunks, truncate)

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
        return wait_for(self._submit(self._engine.logits([arrays[name] for name in INPUT_NAMES])))

    def close(self) -> None:
        """Stop the group, and Ray if `load` started it; threads that wait get an error. Safe to repeat."""
        with self._closing:
            if self._loop.stopped:
                return
            try:
                self._loop.run(self._engine.stop())
            finally:
                self._end()

    def _end(self) -> None:
        atexit.unregister(self.close)
        self._loop.stop()
        if self._owns_ray:
            from tpray.local_ray.local import stop_ray

            stop_ray()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            return self._loop.submit(work)
        except RuntimeError as e:
            raise ConfigError("this classifier was closed: load it again") from e

    def __enter__(self) -> LocalClassifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    model: str | Path | None = None,
    tp: int | Literal["auto"] = AUTO,
    dtype: DtypeName = AUTO,
    runtime: str = AUTO,
    cores: int | None = None,
    plan: Path | dict[str, Any] | None = None,
    buckets: str | Sequence[tuple[int, int]] = (),
    out: Path | None = None,
    progress: Callable[[PhaseReport], None] | None = None,
    executor: Executor | None = None,
    instance_family: InstanceFamily | None = None,
    neuron_layout: NeuronLayout = AUTO,
    lnc: Literal[1, 2] | None = None,
    store: str | None = None,
    revision: str | None = None,
    trace_only: bool = False,
    in_process: bool = False,
    chat_template: Path | None = None,
    classifier_from_token: Sequence[str] = (),
    verify_key: Path | None = None,
) -> LocalClassifier:
    """Bring up one group on this machine, starting Ray here if there is none.

    Args:
        model: a Hub id, a checkpoint directory, an artifact directory or its URL; None is the embedded demo.
        tp: the tensor-parallel degree; ``auto`` is what costs least to start: that of a traced model, else one rank.
        dtype: what the shards compute in; ``auto`` is the fastest that the cores multiply natively.
        runtime: the kind of core.
        cores: cores per rank; the default shares this machine's out.
        plan: how to shard it, for an architecture that tpray's table lacks: a plan file, or what it holds.
        buckets: trace one program for each [batch, length] and no other, ``"8x32,8x128"``; the default takes any shape.
        out: keep the traced artifact in this directory instead of the cache.
        progress: called with a `PhaseReport` after each start-up phase.
        executor: what starts the ranks, when they are not to be Ray actors; its topology counts, and not ``tp``.
        instance_family, neuron_layout, lnc: on NeuronCores; see `tpray.config.ParallelConfig`.
        store: URL of a folder that machines share: what one of them traced, the others fetch.
        revision: branch, tag or commit of a Hub id.
        trace_only: where no cores are free here to run the model, trace it all the same, if its runtime can; the
            classifier has an artifact then, and no ranks.
        in_process: a single rank on CPU cores is a thread of this process, without Ray: it comes up in a third of the
            time, and nothing brings it back if it dies.
        chat_template: a jinja file that makes a text of a conversation, instead of the tokenizer's own.
        classifier_from_token: words of a language model that become the labels, ``("no", "yes")`` of a reranker that
            answers so.
        verify_key: a public key in PEM: take no model but an artifact that was signed with its private one.

    Raises:
        TprayError: the model, the degree or the machine does not fit; the message says what would.
    """
    shapes = parse(buckets) if isinstance(buckets, str) else tuple(buckets)
    named = None if model is None else str(model)
    config = ModelConfig(
        source=named,
        revision=revision,
        plan=plan,
        chat_template=chat_template,
        classifier_from_token=tuple(classifier_from_token),
        dtype=dtype,
        buckets=shapes,
        store=store,
        verify_key=verify_key,
    )
    parallel = ParallelConfig(
        tp=cheapest_degree(named) if tp == AUTO else tp,
        cores_per_rank=cores,
        runtime=runtime,
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=lnc,
    )
    topology = Topology.of(parallel) if executor is None else executor.topology
    found = recall_or_find(config, topology, out)  # before anything is started
    owns_ray = False
    if executor is None and in_process and topology.tp == 1 and not topology.on_assigned_cores:
        from tpray.group.thread_executor import ThreadExecutor

        executor = ThreadExecutor(topology)
    if executor is None:
        from tpray.group.nodes import has_room_here
        from tpray.group.ray_executor import RayExecutor
        from tpray.local_ray.local import ensure_ray

        owns_ray = ensure_ray(max(core_count(), topology.tp * topology.threads))
        if trace_only and not has_room_here(topology):
            topology = topology.for_tracing()
        executor = RayExecutor(topology)
    group = ClassifierGroup(config, executor, BatchConfig().step_timeout_s, progress, found, out)
    # Nobody else asks, and who asks for much is ready to wait for it.
    return LocalClassifier(group, BatchConfig(max_queue_s=0), owns_ray)
