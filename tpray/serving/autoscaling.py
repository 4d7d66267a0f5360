"""How many groups there are: as many as the tokens that wait for a step call for.

Tokens, and not requests, because a request is one text or thirty-two, of five tokens or five hundred. Each replica
tells Serve how many tokens wait in its queue; Serve averages them over a while, asks `TokenBacklog`, and applies its
own delays and bounds to the answer.

Source: https://docs.ray.io/en/latest/serve/advanced-guides/advanced-autoscaling.html (custom policies, custom metrics)
"""

from __future__ import annotations

import math
from typing import Any

from tpray.serving.metrics import QUEUE_TOKENS

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


class TokenBacklog:
    """A Serve autoscaling policy; see `wanted_replicas`."""

    def __init__(self, backlog_tokens: int) -> None:
        self._backlog_tokens = backlog_tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas that are wanted, before Serve's delays; and no state."""
        reported = (context.aggregated_metrics or {}).get(QUEUE_TOKENS.name, {})
        if not reported:
            return context.target_num_replicas, {}
        return wanted_replicas(list(reported.values()), context.target_num_replicas, self._backlog_tokens), {}
