"""Every metric of a replica: one row for each, which says what it means and where it is read from when somebody asks.

Nothing is counted twice. What others know is read from them; what nobody needs but the metrics is in `load.Load`.
``GET /metrics`` has them all (`scrape`), Ray's own metrics too (`ray_metrics`), ``/info`` has `FIGURES`, and
`autoscaling` decides by `QUEUE_TOKENS`. Names follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tpray.group.lifecycle import State
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.keys import KeyRing
from tpray.serving.load import ROWS, SECONDS, SHARES, Histogram, Load
from tpray.version import __version__


@dataclass(frozen=True)
class Sources:
    """What the metrics of a replica are read from. memory: bytes of each rank's process; see `memory.memory_of`."""

    engine: Engine
    gate: Gate
    keys: KeyRing
    memory: Mapping[int, int]


Value = float | Histogram
Samples = Iterable[tuple[tuple[str, ...], Value]]
"""The values of labels, and what is measured there."""


@dataclass(frozen=True)
class Metric:
    """A row. meaning: one line, with the unit. labels: beside ``model`` and ``replica``, which all have.

    buckets: the upper bounds of a histogram's.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    read: Callable[[Sources], Samples]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _one(read: Callable[[Engine], Value]) -> Callable[[Sources], Samples]:
    """A metric without labels."""
    return lambda of: [((), read(of.engine))]


def _counted(counts: Mapping[str, float]) -> Samples:
    return [((name,), float(count)) for name, count in counts.items()]


def _tokens(of: Sources) -> Samples:
    used = {name: usage.tokens for name, usage in of.keys.usage().items()}
    return _counted(used | {"": of.engine.load.tokens_without_key})


def _requests(load: Load) -> Samples:
    return [((dialect, str(status), key), float(n)) for (dialect, status, key), n in load.requests.items()]


def _refusals(load: Load) -> Samples:
    return _counted(load.refusals)


def _request_seconds(load: Load) -> Samples:
    return [((dialect,), each) for dialect, each in load.request_s.items()]


def _phases(of: Sources) -> Samples:
    seconds: dict[str, float] = {}
    for reports in (of.engine.startup, of.engine.group.phases):  # of the first start, and in their place of the last
        seconds |= dict.fromkeys((report.name for report in reports), 0.0)
        for report in reports:  # a phase that was tried again comes more than once
            seconds[report.name] += report.seconds
    return _counted(seconds)


def _info(of: Sources) -> Samples:
    manifest = of.engine.group.artifact.manifest
    return [((__version__, manifest.model.model_type, manifest.runtime, manifest.dtype, str(manifest.tp)), 1.0)]


QUEUE_TOKENS = Metric(
    "tpray_queue_tokens", "gauge", "tokens that wait for a step", _one(lambda e: float(e.queued_tokens))
)
TOKENS_PER_SECOND = Metric(
    "tpray_tokens_per_second",
    "gauge",
    "tokens computed a second while rows waited; 0: not known",
    _one(lambda e: e.tokens_per_s),
)
NOT_FINITE = Metric(
    "tpray_rows_not_finite_total",
    "counter",
    "rows whose logits were NaN or infinite",
    _one(lambda e: float(e.load.rows_not_finite)),
)
RESTARTS = Metric(
    "tpray_group_restarts_total", "counter", "how often the group came back", _one(lambda e: float(e.restarts))
)

METRICS: tuple[Metric, ...] = (
    Metric(
        "tpray_requests_total",
        "counter",
        "requests answered; dialect: the route's, `none` about the server itself; key: its name, if one was shown",
        lambda of: _requests(of.engine.load),
        ("dialect", "status", "key"),
    ),
    Metric(
        "tpray_refusals_total",
        "counter",
        "requests that classify, or were not let in, answered with an error; by its reason",
        lambda of: _refusals(of.engine.load),
        ("reason",),
    ),
    Metric("tpray_tokens_total", "counter", "tokens of the texts of requests, by the key that pays", _tokens, ("key",)),
    Metric("tpray_rows_total", "counter", "rows computed", _one(lambda e: float(e.load.rows))),
    Metric("tpray_steps_total", "counter", "steps answered", _one(lambda e: float(sum(e.load.step_s.counts)))),
    Metric(
        "tpray_step_tokens_total",
        "counter",
        "tokens computed in steps: text, and padding where that is computed",
        lambda of: _counted({"text": of.engine.load.tokens, "padding": of.engine.load.padding}),
        ("kind",),
    ),
    Metric(
        "tpray_steps_halved_total",
        "counter",
        "steps that raised on all ranks and were run again in halves",
        _one(lambda e: float(e.load.steps_halved)),
    ),
    Metric(
        "tpray_replays_total",
        "counter",
        "rows put back because the group failed in their step",
        _one(lambda e: float(e.load.replays)),
    ),
    Metric(
        "tpray_poison_rows_total",
        "counter",
        "rows refused because they brought the group down twice",
        _one(lambda e: float(e.load.poison_rows)),
    ),
    NOT_FINITE,
    RESTARTS,
    Metric(
        "tpray_canary_failures_total",
        "counter",
        "how often the canary was answered wrongly, after which the group restarts",
        _one(lambda e: float(e.group.canary_failures)),
    ),
    Metric(
        "tpray_rank_compute_seconds_total",
        "counter",
        "seconds in a rank's program without waiting; a slow rank has more than others",
        lambda of: [((str(n),), each.compute_s) for n, each in enumerate(of.engine.group.channel.times)],
        ("rank",),
    ),
    Metric(
        "tpray_rank_wait_seconds_total",
        "counter",
        "seconds that a rank waited for others in collectives; a slow rank has less",
        lambda of: [
            ((str(n),), each.wait_s) for n, each in enumerate(of.engine.group.channel.times) if each.wait_s is not None
        ],
        ("rank",),
    ),
    Metric(
        "tpray_artifact_loads_total",
        "counter",
        "artifacts by where they came from: named, cache, store, traced, or another group that traced it meanwhile",
        lambda of: _counted(of.engine.group.artifact_loads),
        ("source",),
    ),
    Metric("tpray_queue_rows", "gauge", "rows that wait for a step", _one(lambda e: float(e.waiting()[0]))),
    QUEUE_TOKENS,
    Metric(
        "tpray_queue_oldest_seconds",
        "gauge",
        "seconds since the oldest row that waits was queued",
        _one(lambda e: e.waiting()[1]),
    ),
    Metric(
        "tpray_requests_in_progress",
        "gauge",
        "requests let in and not answered yet",
        lambda of: [((), float(of.gate.under_way))],
    ),
    TOKENS_PER_SECOND,
    Metric(
        "tpray_rank_memory_bytes",
        "gauge",
        "bytes of memory of a rank's process, shared pages divided among those that share them (PSS)",
        lambda of: [((str(rank),), float(size)) for rank, size in of.memory.items()],
        ("rank",),
    ),
    Metric(
        "tpray_group_up",
        "gauge",
        "1: the group takes steps",
        _one(lambda e: float(e.group.lifecycle.state is State.READY)),
    ),
    Metric(
        "tpray_canary_age_seconds",
        "gauge",
        "seconds since the canary was last answered",
        _one(lambda e: time.monotonic() - e.group.canary_at),
    ),
    Metric(
        "tpray_canary_difference",
        "gauge",
        "largest difference of its logits from the unsharded model's",
        _one(lambda e: e.group.canary_difference),
    ),
    Metric("tpray_startup_phase_seconds", "gauge", "seconds that a phase of the last start took", _phases, ("phase",)),
    Metric(
        "tpray_info",
        "gauge",
        "1: what is served",
        _info,
        ("version", "model_type", "runtime", "dtype", "tp"),
    ),
    Metric(
        "tpray_request_seconds",
        "histogram",
        "seconds from a request's headers to its answer",
        lambda of: _request_seconds(of.engine.load),
        ("dialect",),
        SECONDS,
    ),
    Metric(
        "tpray_tokenize_seconds",
        "histogram",
        "seconds in which a request's texts became tokens, waiting for a thread included",
        _one(lambda e: e.load.tokenize_s),
        buckets=SECONDS,
    ),
    Metric(
        "tpray_queue_seconds",
        "histogram",
        "seconds that a request's rows waited for their steps, the longest of them",
        _one(lambda e: e.load.queue_s),
        buckets=SECONDS,
    ),
    Metric(
        "tpray_step_seconds",
        "histogram",
        "seconds from when the ranks could begin a step until all had answered",
        _one(lambda e: e.load.step_s),
        buckets=SECONDS,
    ),
    Metric("tpray_step_rows", "histogram", "rows of a step", _one(lambda e: e.load.step_rows), buckets=ROWS),
    Metric(
        "tpray_step_fill_ratio",
        "histogram",
        "tokens of a step's texts over the most that a step may have",
        _one(lambda e: e.load.step_fill),
        buckets=SHARES,
    ),
)

OF_REQUESTS: Mapping[str, Callable[[Load], Samples]] = {
    "tpray_requests_total": _requests,
    "tpray_refusals_total": _refusals,
    "tpray_request_seconds": _request_seconds,
}
"""Those that need no engine, for what is in front of several models."""

MISSING = "tpray_replicas_missing"
MISSING_MEANS = "replicas of this model that did not answer this scrape, and are left out"
"""The one metric of a scrape, and not of a replica."""

FIGURES = (QUEUE_TOKENS, TOKENS_PER_SECOND, NOT_FINITE, RESTARTS)


def read_figures(engine: Engine) -> dict[str, float]:
    """`FIGURES` as they are now, by their names."""
    of = Sources(engine, Gate(), KeyRing(), {})
    return {metric.name: value for metric in FIGURES for _, value in metric.read(of) if isinstance(value, float)}
