"""The core of the server, with neither Serve nor HTTP in it: text in, scores out, and a group kept alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpray.config import BatchConfig
from tpray.errors import EmptyInputError, GroupError, PayloadTooLargeError
from tpray.group.group import ShardGroup
from tpray.serving.batcher import Batcher
from tpray.serving.text import Direction, Item, Score, TextCodec

log = logging.getLogger("tpray.engine")

RESTARTS = 3
"""How often in a row a group is brought up again before its replica gives up and lets Serve place a new one."""

INLINE_CHARS = 8192
"""Longer input is tokenised on a thread: it would hold up the event loop for more than about a millisecond."""


@dataclass(frozen=True)
class Answer:
    """What became of one request: scores per item, and where its time went."""

    scores: list[list[Score]]
    tokens: int
    tokenize_s: float
    queue_s: float
    compute_s: float
    total_s: float


class Engine:
    """Classifies items on one group, and restarts the group when it fails.

    Args:
        group: not started yet; `start` starts it.
        config: the limits.
    """

    def __init__(self, group: ShardGroup, config: BatchConfig) -> None:
        self.group, self.config = group, config
        self.restarts = 0
        self._ready = asyncio.Event()
        self._dead: GroupError | None = None
        self._codec: TextCodec | None = None
        self._batcher: Batcher | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._reads_padding = False
        self._checked = float("-inf")

    async def start(self) -> None:
        """Start the group, load the tokenizer, open the queue."""
        await self.group.start()
        artifact = self.group.artifact
        assert artifact is not None, "a group that started has an artifact"
        try:
            model = artifact.manifest.model
            self._codec = await asyncio.to_thread(TextCodec, artifact.model_directory, model)
        except BaseException:
            await self.group.stop()
            raise
        self._reads_padding = model.sharding.reads_padding
        self._batcher = Batcher(
            self.group.step,
            self._ready,
            self._batching(),
            self._codec.pad_id,
            self.group.packs_rows,
            self.group.buckets,
        )
        self._ready.set()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_alive())

    def _batching(self) -> BatchConfig:
        return self.config.model_copy(update={"max_padding": 0.0}) if self._reads_padding else self.config

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a step."""
        return self._batcher.queued_tokens if self._batcher is not None else 0

    def reconfigure(self, config: BatchConfig) -> None:
        """Work within other limits from now on; what is queued stays queued."""
        self.config = config
        self.group.step_timeout_s = config.step_timeout_s
        if self._batcher is not None:
            self._batcher.reconfigure(self._batching())

    async def stop(self) -> None:
        """Close the queue and stop the group."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.close(GroupError("the server is shutting down"))
        await self.group.stop()

    @property
    def codec(self) -> TextCodec:
        """The model's tokenizer and labels."""
        assert self._codec is not None, "the engine was not started"
        return self._codec

    async def classify(
        self,
        items: Sequence[Item],
        raw_scores: bool = False,
        truncate: bool = False,
        direction: Direction = "Right",
        timeout_s: float | None = None,
    ) -> Answer:
        """Score every label for every item.

        Args:
            items: texts, or pairs of texts.
            raw_scores: logits instead of probabilities.
            truncate, direction: see `TextCodec.encode`.
            timeout_s: how long the caller will wait; the default is the server's.

        Raises:
            InputError: an item cannot be classified; nothing was queued.
            OverloadedError, DeadlineError, GroupError: see `Batcher.submit`.
        """
        started = time.perf_counter()
        assert self._batcher is not None, "the engine was not started"
        if not items:
            raise EmptyInputError("`inputs` is empty: send at least one text")
        if len(items) > self.config.max_client_batch_size:
            raise PayloadTooLargeError(
                f"`inputs` has {len(items)} items and the limit is {self.config.max_client_batch_size}: send "
                "smaller batches"
            )
        if self._dead is not None:
            raise self._dead
        if sum(len(item) if isinstance(item, str) else len(item[0]) + len(item[1]) for item in items) > INLINE_CHARS:
            rows = await asyncio.to_thread(self.codec.encode, items, truncate, direction)
        else:
            rows = self.codec.encode(items, truncate, direction)
        tokenized = time.perf_counter()
        results = await self._batcher.submit(rows, timeout_s or self.config.request_timeout_s)
        scores = [self.codec.scores(result.logits, raw_scores) for result in results]
        return Answer(
            scores=scores,
            tokens=sum(map(len, rows)),
            tokenize_s=tokenized - started,
            queue_s=max(result.queue_s for result in results),
            compute_s=max(result.compute_s for result in results),
            total_s=time.perf_counter() - started,
        )

    async def check(self, timeout_s: float = 5.0) -> None:
        """Run one token through every rank, unless that was done within the last second.

        Raises:
            GroupError: the group does not answer; it is being restarted, or is given up.
        """
        if self._dead is not None:
            raise self._dead
        if not self._ready.is_set():
            raise GroupError(f"the group is restarting: {self.group.error}")
        if time.monotonic() - self._checked > 1.0:
            token = np.ones((1, 1), dtype=np.int64)
            # The step's own limit holds, not this check's: a busy group is healthy.
            await asyncio.wait_for(self.group.step([token, token, token * 0]), self.group.step_timeout_s + timeout_s)
            self._checked = time.monotonic()

    def check_alive(self) -> None:
        """Raise `GroupError` once the group has been given up; a restart under way is no reason to."""
        if self._dead is not None:
            raise self._dead

    async def _keep_alive(self) -> None:
        failures = 0
        while True:
            await self.group.failed.wait()
            self._ready.clear()
            try:
                await self.group.restart()
            except Exception as e:  # noqa: BLE001  # any failed start counts, whatever it raised
                failures += 1
                log.error("restart %d of %d failed: %s", failures, RESTARTS, e)
                if failures == RESTARTS:
                    self._dead = GroupError(f"the group could not be brought back: {e}")
                    assert self._batcher is not None, "the keeper starts after the batcher"
                    await self._batcher.close(self._dead)
                    return
                await asyncio.sleep(failures)
            else:
                failures = 0
                self.restarts += 1
                self._ready.set()
