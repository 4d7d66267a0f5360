"""How many groups there are: as many as the tokens that wait for a step call for.

Tokens, and not requests, because a request is one text or thirty-two, of five tokens or five hundred. Each replica
tells Serve how many tokens wait in its queue; Serve averages them over a while, asks `TokenBacklog`, and applies its
own delays and bounds to the answer. Without any group there is nobody to tell; then a request that waits in Serve's
proxy or at a handle calls for the first.

Source: https://docs.ray.io/en/latest/serve/advanced-guides/advanced-autoscaling.html (custom policies, custom metrics)
"""

from __future__ import annotations

import math
from typing import Any

from ray import serve

from tpray.config import ServeConfig
from tpray.serving.engine import Engine
from tpray.serving.metrics import QUEUE_TOKENS

RECENT_S = 15  # longer than replicas wait between two reports
RECENT_TOKENS = "tpray_recent_tokens"
"""Tokens of the last `RECENT_S`. A group that keeps up has no backlog, and is needed all the same if anybody asks."""

SHRINK_BELOW = 0.5
"""With less than this share of what one group fewer would be allowed, that one is enough: no group comes and goes."""


def wanted_replicas(backlogs: list[float], replicas: int, backlog_tokens: int) -> int:
    """How many groups the waiting tokens call for.

    Args:
        backlogs: tokens that wait at each replica that reported.
        replicas: how many there are to be now.
        backlog_tokens: how many may wait for each.
    """
    waiting = sum(backlogs)
    enough = max(1, math.ceil(waiting / backlog_tokens))
    if enough >= replicas:
        return enough
    return max(1, replicas - 1) if waiting < SHRINK_BELOW * backlog_tokens * (replicas - 1) else replicas


def autoscaling_stats(engine: Engine) -> dict[str, float]:
    """What a replica tells Serve."""
    recent = engine.load.tokens_within(RECENT_S)
    return {QUEUE_TOKENS.name: float(engine.queued_tokens), RECENT_TOKENS: float(recent)}


class TokenBacklog:
    """A Serve autoscaling policy; see `wanted_replicas`.

    With ``min_replicas`` 0 the last group goes when nobody has asked for `RECENT_S`.
    """

    def __init__(self, backlog_tokens: int) -> None:
        self._backlog_tokens = backlog_tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas that are wanted, before Serve's delays; and no state."""
        metrics, target = context.aggregated_metrics or {}, context.target_num_replicas
        reported = metrics.get(QUEUE_TOKENS.name, {})
        if target == 0:
            return int(context.total_num_requests > 0), {}
        if not reported:
            return target, {}
        wanted = wanted_replicas(list(reported.values()), target, self._backlog_tokens)
        idle = context.total_num_requests == 0 and not any(metrics.get(RECENT_TOKENS, {"": 1.0}).values())
        if target == wanted == 1 and idle and context.capacity_adjusted_min_replicas == 0:
            wanted = 0
        return wanted, {}


def scaling_options(config: ServeConfig) -> dict[str, Any]:
    """How many replicas there are: Serve's options."""
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.replicas}
    policy = serve.config.AutoscalingPolicy(
        policy_function="tpray.serving.autoscaling:TokenBacklog",
        policy_kwargs={"backlog_tokens": scaling.backlog_tokens},
    )
    return {
        "autoscaling_config": serve.config.AutoscalingConfig(
            **scaling.model_dump(exclude={"backlog_tokens"}),
            initial_replicas=max(1, scaling.min_replicas),  # what cannot work shows, and is traced, before anybody asks
            metrics_interval_s=min(10.0, scaling.look_back_period_s / 2),
            policy=policy,
        )
    }
