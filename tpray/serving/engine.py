"""The core of the server, with neither Serve nor HTTP in it: text in, scores out, and a group kept alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tpray.artifacts.folder import Artifact
from tpray.chat import Chat
from tpray.config import BatchConfig
from tpray.errors import (
    DeadlineError,
    EmptyInputError,
    GroupError,
    ItemError,
    LogitsError,
    NotReadyError,
    ParityError,
    PayloadTooLargeError,
)
from tpray.group.channel import StepResult
from tpray.group.classifier import ClassifierGroup
from tpray.group.lifecycle import State
from tpray.group.phases import LAST_SPAN, PhaseReport, Spans
from tpray.group.wire import Array
from tpray.parallel_layers.tasks import TEXT, TOKEN
from tpray.serving.answers import Answer, Ranking
from tpray.serving.batcher import NOT_FINITE, Batcher
from tpray.serving.canary_watch import CanaryWatch
from tpray.serving.chunked_items import encode_chunks
from tpray.serving.chunks import WHOLE, Chunks, numbered
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.keys import charge
from tpray.serving.load import Load
from tpray.serving.relevance import Relevance
from tpray.serving.request_notes import note_rows
from tpray.serving.rows import RowResult
from tpray.serving.scores import OWN, Ranked, Score, Scoring, activated, labelled, own_activation, ranked
from tpray.serving.token_codec import TokenCodec, check_task
from tpray.serving.tokenizer_facts import facts_path, keep_facts, read_facts
from tpray.serving.tokenizer_threads import INLINE_CHARS, TokenizerThreads, characters_in
from tpray.tokenizer import Encoded, Item


class Engine:
    """Classifies items on one group, which restarts itself when it fails.

    Args:
        group: not started yet; `start` starts it.
        config: the limits.
    """

    def __init__(self, group: ClassifierGroup, config: BatchConfig) -> None:
        self.group, self.config = group, config
        self._codec: TextCodec | None = None
        self._batcher: Batcher | None = None
        self.load = Load()
        self.startup: tuple[PhaseReport, ...] = ()
        """The spans of the first start: what came before the group, the group's phases, the tokenizer."""
        self._checked = float("-inf")
        self._relevance: Relevance | None = None  # read when the first query comes
        self._watch = CanaryWatch(group, lambda: self._batcher is None or self._batcher.idle)
        self.tokenizing = TokenizerThreads()

    async def start(self) -> None:
        """Start the group, load the tokenizer, open the queue."""
        await self.group.start()
        self.startup = tuple(self.group.phases)
        artifact = self.group.artifact
        try:
            self._codec = await asyncio.to_thread(self._make_codec, artifact)
        except BaseException:
            await self.group.stop()
            raise
        spans = Spans(lambda _: None, self.startup[-1].ended)
        spans.end(LAST_SPAN)
        self.startup += tuple(spans.reports)
        group, pad_id = self.group, self._codec.pad_id
        self._batcher = Batcher(
            group, self._batching(), pad_id, group.packs_rows, group.buckets, group.parts, self.load
        )
        self._watch.start(self.config.canary_interval_s)

    @staticmethod
    def _make_codec(artifact: Artifact) -> TextCodec:
        record = artifact.manifest.model
        kept = facts_path(artifact.manifest.model_files, record.max_length)
        codec = (TokenCodec if record.task == TOKEN else TextCodec)(artifact.model_directory, record, read_facts(kept))
        for text in artifact.manifest.canary.texts:
            item = text.texts[0] if len(text.texts) == 1 else (text.texts[0], text.texts[1])
            (row,) = codec.encode([item], truncate=True, direction="Right")
            if (tuple(row.ids), tuple(row.types)) != (text.ids, text.types):
                raise ParityError(
                    f"the tokenizer in {artifact.model_directory} makes other tokens of {item!r} than transformers did "
                    "when the model was traced: trace the model again"
                )
        keep_facts(kept, codec.facts)
        return codec

    def _batching(self) -> BatchConfig:
        reads_padding = self.group.artifact.manifest.model.reads_padding
        return self.config.model_copy(update={"max_padding": 0.0}) if reads_padding else self.config

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a step."""
        return self._batcher.queued_tokens if self._batcher is not None else 0

    def waiting(self) -> tuple[int, float]:
        """See `Batcher.waiting`."""
        return self._batcher.waiting() if self._batcher is not None else (0, 0.0)

    @property
    def tokens_per_s(self) -> float:
        """How many tokens the group computes a second when rows wait for it; 0: that is not known."""
        return self._batcher.tokens_per_s if self._batcher is not None else 0.0

    @property
    def restarts(self) -> int:
        """How often the group came back."""
        return self.group.lifecycle.restarts

    def reconfigure(self, config: BatchConfig) -> None:
        """Work within other limits from now on; what is queued stays queued."""
        self.config = config
        self.group.step_timeout_s = config.step_timeout_s
        if self._batcher is not None:
            self._batcher.reconfigure(self._batching())
            self._watch.start(config.canary_interval_s)

    async def stop(self) -> None:
        """Close the queue, whose rows are told so at once, and stop the group."""
        self._watch.stop()
        if self._batcher is not None:
            await self._batcher.close(GroupError("this classifier is being closed"))
        await self.group.stop()
        self.tokenizing.close()

    @property
    def codec(self) -> TextCodec:
        """The model's tokenizer and labels."""
        assert self._codec is not None, "the engine was not started"
        return self._codec

    async def classify(
        self,
        items: Sequence[Item],
        scoring: Scoring = OWN,
        truncate: bool = False,
        direction: Direction | None = None,
        deadline: float | None = None,
        chunks: Chunks | None = None,
        max_length: int | None = None,
    ) -> Answer:
        """Score every label for every item.

        Args:
            items: texts, pairs of texts, conversations, or token ids.
            scoring: the scores to give, and of which labels; all, with the checkpoint's activation.
            truncate, direction, max_length: see `TextCodec.encode`.
            deadline: until when the caller waits, `time.monotonic` seconds; None: the server's limit from now on.
            chunks: read texts in chunks, each a row as far as limits go; see `TextCodec.encode_chunks`.

        Raises:
            InputError: an item cannot be classified; nothing was queued.
            LogitsError: the model's answer to an item is NaN or infinite.
            StepError: the model raised for an item, on all ranks alike. RefusedError: the ranks died of it before.
            OverloadedError, DeadlineError, GroupError: see `Batcher.submit`.
        """
        check_task(self.codec.record, TEXT)
        if not items:
            raise EmptyInputError("there is nothing to classify: send at least one text")
        if len(items) > self.config.max_client_batch_size:
            raise PayloadTooLargeError(
                f"there are {len(items)} items and the limit is {self.config.max_client_batch_size}: send smaller "
                "batches"
            )
        characters = sum(map(characters_in, items))
        inline = characters <= INLINE_CHARS and self.codec.compiled and Chat not in map(type, items)

        def rows(until: float) -> list[Encoded]:
            return self.codec.encode(items, truncate, direction, until, max_length)

        if chunks is None:
            results, timing = await self.answer(len(items), rows, None if inline else characters, deadline)
            scores = [self._scores(result, scoring) for result in results]
            return Answer(**timing, scores=scores)
        of: list[int] = []

        def rows_of_chunks(until: float) -> list[Encoded]:
            return numbered(
                encode_chunks(
                    self.codec, items, chunks, truncate, direction, until, self.config.max_concurrent_requests
                ),
                of,
            )

        results, timing = await self.answer(len(items), rows_of_chunks, characters, deadline, of)
        record = self.codec.record
        values = chunks.aggregated(activated(_logits(results), record, scoring.activation), of)
        found = [scoring.chosen(scores) for scores in ranked(values, record)]
        return Answer(**timing, scores=found)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        scoring: Scoring = OWN,
        truncate: bool = True,
        direction: Direction | None = None,
        deadline: float | None = None,
        chunks: Chunks | None = None,
        max_length: int | None = None,
        document_tokens: int | None = None,
    ) -> Ranking:
        """Score how relevant each document is for a query; see `relevance`.

        Args:
            documents: as many as the queue takes, ``max_concurrent_requests``; steps are made of them by their lengths.
            scoring: how documents are scored, and how many of the best are given.
            truncate, direction: cut documents that are too long, and at which end; see `TextCodec.encode_after`.
            deadline, chunks: as for `classify`; a document is read in chunks, the whole query before each.
            max_length, document_tokens: see `Relevance.rows`.

        Raises:
            UnsupportedTaskError: the model is no reranker.
            As `classify`; the number of an error is its document's, and one of the query has none.
        """
        if not documents:
            raise EmptyInputError("there are no documents to rank: send at least one")
        if len(documents) > self.config.max_concurrent_requests:
            raise PayloadTooLargeError(
                f"there are {len(documents)} documents and the limit is {self.config.max_concurrent_requests} "
                "(--max-concurrent-requests): send fewer"
            )
        of: list[int] = []
        whole = chunks or WHOLE

        def rows(until: float) -> list[Encoded]:
            if self._relevance is None:
                self._relevance = Relevance.of(self.group.artifact.model_directory, self.codec)
            most = self.config.max_concurrent_requests
            made = self._relevance.rows(
                self.codec, query, documents, truncate, direction, until, whole, most, max_length, document_tokens
            )
            return numbered(made, of)

        characters = len(query) + sum(map(len, documents))
        results, timing = await self.answer(len(documents), rows, characters, deadline, of)
        assert self._relevance is not None, "made with the rows"
        scores = whole.aggregated(self._relevance.scores(_logits(results), scoring.activation), of).tolist()
        best_first = sorted((Ranked(*each) for each in enumerate(scores)), key=lambda each: (-each.score, each.index))
        return Ranking(**timing, documents=scoring.chosen(best_first))

    async def answer(
        self,
        count: int,
        encode: Callable[[float], list[Encoded]],
        characters: int | None,
        deadline: float | None,
        of: Sequence[int] = (),
    ) -> tuple[list[RowResult], dict[str, Any]]:
        """Tokenise, queue, and wait for the rows of ``count`` items; and the fields of `Timing`.

        Args:
            encode: makes the rows until a deadline. characters: that it reads; None: so few that no thread is needed.
            of: which item each row is of, once they are made; empty: there is one of each.
        """
        started = time.perf_counter()
        assert self._batcher is not None, "the engine was not started"
        self.check_alive()
        if deadline is None:
            deadline = time.monotonic() + self.config.request_timeout_s
        # Before any work: what is refused must cost little.
        self._batcher.check_room(count, deadline - time.monotonic())
        rows = encode(deadline) if characters is None else await self.tokenizing.run(encode, characters, deadline)
        tokens, load = sum(map(len, rows)), self.load
        load.tokens_without_key += 0 if charge(tokens) else tokens
        note_rows(rows, started)
        tokenized = time.perf_counter()
        load.tokenize_s.add(tokenized - started)
        try:
            results = await self._batcher.submit(rows, deadline - time.monotonic())
        except ItemError as e:
            if isinstance(e, LogitsError):
                self._watch.suspect()
            if not of or e.item is None:
                raise
            raise type(e)(e.message, of[e.item]) from e
        queue_s = max(result.queue_s for result in results)
        load.queue_s.add(queue_s)
        return results, {
            "tokens": tokens,
            "tokenize_s": tokenized - started,
            "queue_s": queue_s,
            "compute_s": max(result.step.compute_s for result in results),
            "total_s": time.perf_counter() - started,
        }

    def _scores(self, result: RowResult, scoring: Scoring) -> list[Score]:
        """A row's scores; those of its whole step are made at once."""
        step, how = result.step, scoring.activation or own_activation(self.codec.record)
        if how not in step.scores:
            step.scores[how] = labelled(step.logits, self.codec.record, how)
        return scoring.chosen(step.scores[how][result.row])

    async def logits(self, inputs: Sequence[Array], timeout_s: float | None = None) -> Array:
        """Run the program on token ids, in a step of its own; while the group restarts the call waits.

        Args:
            inputs: ids, mask and types int64 ``[B, S]``.
            timeout_s: how long the caller will wait; the default is the server's.

        Returns:
            float32 ``[B, L]``.

        Raises:
            DeadlineError: ``timeout_s`` passed first.
            InputError: ids that the model does not know.
            LogitsError: the model's answer is NaN or infinite.
            StepError: the model raised, on all ranks alike.
            GroupError: the group failed in this step, and again when it was repeated once; or it was stopped.
        """
        limit_s = timeout_s or self.config.request_timeout_s
        self.group.artifact.manifest.model.check_inputs(inputs)
        try:
            logits = (await asyncio.wait_for(self._step(inputs), limit_s)).logits
        except TimeoutError as e:
            raise DeadlineError(f"the request was not answered within {limit_s:g} s") from e
        wrong = np.flatnonzero(~np.isfinite(logits).reshape(len(logits), -1).all(axis=1))
        if len(wrong):
            raise LogitsError(NOT_FINITE, int(wrong[0]))
        return logits

    async def _step(self, inputs: Sequence[Array]) -> StepResult:
        repeated = False
        while True:
            await self.group.lifecycle.until_ready()
            try:
                return await self.group.step(inputs)
            except NotReadyError:  # it was ready only in passing; nothing was sent
                continue
            except GroupError:
                if repeated:
                    raise
                repeated = True

    async def check_deeply(self, timeout_s: float = 5.0) -> None:
        """Run the canary through every rank, unless that was done within the last second, and compare its logits.

        Raises:
            ParityError: they are wrong, and the group is restarted; see `ClassifierGroup.check_again`.
            GroupError: the group does not answer; it is being restarted, or is given up.
            DeadlineError: it is so busy that the answer takes longer than a step may.
        """
        limit_s = self.group.step_timeout_s + timeout_s
        try:
            await asyncio.wait_for(self._watch.check(), limit_s)
        except TimeoutError as e:
            raise DeadlineError(f"the canary was not answered within {limit_s:g} s") from e

    async def check(self, timeout_s: float = 5.0) -> None:
        """Run one token through every rank, unless that was done within the last second.

        Raises:
            GroupError: the group does not answer; it is being restarted, or is given up.
        """
        self.group.lifecycle.check_ready()
        if time.monotonic() - self._checked > 1.0:
            token = np.ones((1, 1), dtype=np.int64)
            step = self.group.step([token, token, token * 0])
            try:  # the step's own limit holds, not this check's: a busy group is healthy
                await asyncio.wait_for(step, self.group.step_timeout_s + timeout_s)
            except TimeoutError as e:
                raise GroupError("the ranks do not answer") from e
            self._checked = time.monotonic()

    def check_alive(self) -> None:
        """Raise `GroupError` once the group was stopped or given up; not while it restarts."""
        if self.group.lifecycle.state is State.STOPPED:
            raise self.group.lifecycle.why_not_ready()


def _logits(results: Sequence[RowResult]) -> Array:
    """float32 ``[B, L]``."""
    return np.stack([result.logits for result in results])
