"""``GET /metrics``: the metrics of all replicas of a server, in Prometheus's text format or OpenMetrics'.

A request comes to one replica, which asks the others. One that does not answer in time is left out, and
`metrics.MISSING` says so. Of several models the router joins what each of them has said, and
what it has refused itself.

Sources: https://prometheus.io/docs/instrumenting/exposition_formats/, prometheus_client (exposition.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from tpray.platforms.memory import memory_of
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.keys import KeyRing
from tpray.serving.load import Histogram, Load
from tpray.serving.metrics import METRICS, MISSING, MISSING_MEANS, OF_REQUESTS, Metric, Samples, Sources

PATH = "/metrics"
OTHERS_S = 1.5
"""How long the other replicas have to answer. Prometheus itself waits for 10 s by default."""
MODEL_S = 3.0
"""How long a model has, whose replica asks its others."""
ALONE = "local"
"""What a replica is called that has no others."""
ROUTER = "router"
"""And what is in front of several models, which is of no model."""


class Buckets(NamedTuple):
    """A histogram as it was: how many values were in each bucket, those above all bounds last; and their sum."""

    counts: tuple[int, ...]
    sum: float


class Snapshot(NamedTuple):
    """The metrics of one replica, as they go from one to another: of each, by its name, labels and values."""

    model: str
    replica: str
    samples: dict[str, list[tuple[tuple[str, ...], float | Buckets]]]


class Others(NamedTuple):
    """What other replicas have said, and how many have not."""

    snapshots: Sequence[Snapshot]
    missing: int


class Scrape:
    """Reads the metrics of a replica, and asks its others for theirs.

    Args:
        model: what clients are told that it is called. replica: a name that no other has.
        others: asks them; None: there are none.
    """

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        keys: KeyRing,
        model: str,
        replica: str = ALONE,
        others: Callable[[], Awaitable[Others]] | None = None,
    ) -> None:
        self._engine, self._gate, self._keys, self._others = engine, gate, keys, others
        self.model, self.replica = model, replica

    async def own(self) -> Snapshot:
        """This replica's. The memory of its ranks is read on a thread, for the kernel looks at each page."""
        workers = self._engine.group.workers
        pids = {worker.pid: worker.rank for worker in reversed(workers)}  # of those in one process, the first
        sizes = await asyncio.to_thread(lambda: {rank: memory_of(pid) for pid, rank in pids.items()})
        memory = {rank: size for rank, size in sorted(sizes.items()) if size is not None}
        of = Sources(self._engine, self._gate, self._keys, memory)
        samples = {metric.name: _kept(metric.read(of)) for metric in METRICS}
        return Snapshot(self.model, self.replica, samples)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The body for a client that accepts this, and its type."""
        others = Others((), 0) if self._others is None else await self._others()
        snapshots = {each.replica: each for each in (*others.snapshots, await self.own())}
        missing = [((self.model, self.replica), float(others.missing))]
        told = [snapshots[name] for name in sorted(snapshots)]
        return await asyncio.to_thread(rendered, told, missing, accept)  # milliseconds for each replica


def of_router(load: Load) -> Snapshot:
    """What is in front of several models, of the requests that it has answered by itself."""
    return Snapshot("", ROUTER, {name: _kept(read(load)) for name, read in OF_REQUESTS.items()})


def _kept(samples: Samples) -> list[tuple[tuple[str, ...], float | Buckets]]:
    return [(labels, Buckets(tuple(v.counts), v.sum) if isinstance(v, Histogram) else v) for labels, v in samples]


def rendered(
    snapshots: Sequence[Snapshot], missing: Iterable[tuple[tuple[str, str], float]], accept: str
) -> tuple[bytes, str]:
    """See `Scrape.render`. missing: how many replicas are, by model and who has asked them."""
    from prometheus_client import Metric as Family
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.exposition import choose_encoder

    kinds: dict[str, Any] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }

    def family(metric: Metric) -> Family:
        made = kinds[metric.kind](metric.name, metric.meaning, labels=("model", "replica", *metric.labels))
        bounds = [*map(str, metric.buckets), "+Inf"]
        for each in snapshots:
            for labels, value in each.samples.get(metric.name, ()):
                said = (each.model, each.replica, *labels)
                if len(labels) != len(metric.labels):
                    continue  # during an upgrade, of another version of this program; as below
                if isinstance(value, float):
                    made.add_metric(said, value)
                elif len(value.counts) == len(bounds):
                    made.add_metric(said, list(zip(bounds, accumulate(value.counts), strict=True)), value.sum)
        found: Family = made
        return found

    class Collected:
        def collect(self) -> Iterator[Family]:
            yield from map(family, METRICS)
            gauge = GaugeMetricFamily(MISSING, MISSING_MEANS, labels=("model", "replica"))
            for labels, count in missing:
                gauge.add_metric(labels, count)
            yield gauge

    encode, kind = choose_encoder(accept)
    body: bytes = encode(Collected())
    return body, kind


_FAMILY = re.compile(r"^# HELP (\S+) ", re.MULTILINE)
_END = "# EOF\n"


def joined(texts: Iterable[str], silent: Iterable[str]) -> str:
    """One text of several, in which each metric comes once. silent: models that have said nothing."""
    parts: dict[str, list[str]] = {}
    end = ""
    for text in texts:
        end = _END if text.endswith(_END) else end
        _, *named = _FAMILY.split(text.removesuffix(_END))
        for name, rest in zip(named[::2], named[1::2], strict=True):
            lines = rest.splitlines(keepends=True)  # the meaning, the type, samples
            parts.setdefault(name, [f"# HELP {name} {lines[0]}", lines[1]]).extend(lines[2:])
    for model in silent:
        said = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        parts[MISSING].append(f'{MISSING}{{model="{said}",replica=""}} 1.0\n')
    return "".join(line for lines in parts.values() for line in lines) + end
