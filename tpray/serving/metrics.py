"""What a server says of its load: one row for each figure.

``/info`` shows them all; `tpray.serving.autoscaling` decides by `BACKLOG_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpray.serving.engine import Engine


@dataclass(frozen=True)
class Metric:
    """A figure that is read from an engine when somebody asks. meaning: one line, with the unit."""

    name: str
    meaning: str
    read: Callable[[Engine], float]


BACKLOG_TOKENS = Metric("tpray_backlog_tokens", "tokens that wait for a step", lambda e: float(e.queued_tokens))

METRICS: tuple[Metric, ...] = (
    BACKLOG_TOKENS,
    Metric("tpray_tokens_per_s", "tokens computed a second while rows waited; 0: not known", lambda e: e.tokens_per_s),
    Metric("tpray_rows_not_finite", "rows whose logits were NaN or infinite", lambda e: float(e.load.rows_not_finite)),
    Metric("tpray_group_restarts", "how often the group came back since the start", lambda e: float(e.restarts)),
)


def read_metrics(engine: Engine) -> dict[str, float]:
    """Every figure as it is now, by its name."""
    return {metric.name: metric.read(engine) for metric in METRICS}
