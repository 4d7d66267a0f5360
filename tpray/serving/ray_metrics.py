"""A replica's metrics among Ray's own, which the agent of each node exports: for clusters that are watched that way.

Off the path of requests: every `PERIOD_S` what has changed since the last time is told to Ray, on a thread. Ray takes
no histogram as it is, only one value after another; so it is told values that lie in the same buckets and have the same
sum (`spread`), at some microseconds each.

Source: https://docs.ray.io/en/latest/serve/monitoring.html; the names get the prefix ``ray_``, and Serve's tags.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.serve import metrics as of_serve

from tpray.serving.metrics import METRICS, Metric
from tpray.serving.scrape import Buckets, Snapshot

log = logging.getLogger(__name__)

PERIOD_S = 5.0


class RayMetrics:
    """Tells Ray what ``read`` gives.

    Args:
        made: makes a metric of Ray's from a row, with these tags; for tests.
    """

    def __init__(self, read: Callable[[], Awaitable[Snapshot]], made: Callable[[Metric], Any] | None = None) -> None:
        self._read, make = read, made or _made
        self._metrics = {metric.name: make(metric) for metric in METRICS}
        self._told: dict[tuple[str, tuple[str, ...]], float | Buckets] = {}

    async def tell_again_and_again(self) -> None:
        """Until it is cancelled; what goes wrong is logged, and tried again."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await asyncio.to_thread(self.tell, await self._read())
            except Exception:
                log.exception("Ray was not told the metrics")

    def tell(self, snapshot: Snapshot) -> None:
        """Tell what has changed."""
        for metric in METRICS:
            for labels, value in snapshot.samples[metric.name]:
                tags = {"model": snapshot.model, **dict(zip(metric.labels, labels, strict=True))}
                self._tell(metric, labels, value, tags)

    def _tell(self, metric: Metric, labels: tuple[str, ...], value: float | Buckets, tags: dict[str, str]) -> None:
        ray, before = self._metrics[metric.name], self._told.get((metric.name, labels))
        self._told[metric.name, labels] = value
        if isinstance(value, Buckets):
            told = before if isinstance(before, Buckets) else Buckets((0,) * len(value.counts), 0.0)
            new = [now - then for now, then in zip(value.counts, told.counts, strict=True)]
            for seen, count in spread(metric.buckets, new, value.sum - told.sum):
                for _ in range(count):
                    ray.observe(seen, tags)
        elif metric.kind == "gauge":
            ray.set(value, tags)
        else:
            told_before = before if isinstance(before, float) else 0.0
            # One that starts again, as a key's whose line came back, counts from 0.
            more = value - told_before if value >= told_before else value
            if more > 0:
                ray.inc(more, tags)


def _made(metric: Metric) -> Any:
    tags: Any = ("model", *metric.labels)  # whose type Ray takes for that of one
    if metric.kind == "histogram":
        return of_serve.Histogram(metric.name, metric.meaning, boundaries=list(metric.buckets), tag_keys=tags)
    return (of_serve.Counter if metric.kind == "counter" else of_serve.Gauge)(metric.name, metric.meaning, tags)


def spread(bounds: Sequence[float], counts: Sequence[int], total: float) -> list[tuple[float, int]]:
    """Values, and how often each, that fill the buckets below ``bounds`` and above them all as ``counts`` say.

    They add up to ``total`` if that can be: all lie at the same share of their bucket, but those above all bounds,
    which take what is left.
    """
    lows = (0.0, *bounds)
    parts = [(count, low, high - low) for count, low, high in zip(counts, lows, bounds, strict=False)]
    below, span = (sum(part[0] * part[i] for part in parts) for i in (1, 2))
    share = 0.5 if counts[-1] or not span else (total - below) / span
    share = min(1.0, max(1e-6, share))
    values = [(low + share * width, count) for count, low, width in parts if count]
    if counts[-1]:
        rest = (total - sum(value * count for value, count in values)) / counts[-1]
        values.append((max(rest, math.nextafter(bounds[-1], math.inf)), counts[-1]))
    return values
