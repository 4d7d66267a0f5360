"""Groups whose ranks sleep, so that two cores can show how sixteen groups queue; and the routers that were tried.

All else is real: Ray's nodes, Serve, HAProxy, the replicas with their tokenizers, queues and wires. A step takes as
long as its tokens call for (`tpray.group.fake_executor`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import RunningReplica

from tpray.group.executor import Executor
from tpray.group.fake_executor import FakeExecutor
from tpray.platforms.topology import Topology
from tpray.serving.app import Classifier
from tpray.serving.fewest_tokens import FewestTokens

TOKEN_S = "TPRAY_BENCH_TOKEN_S"
"""The variable that says how long a step takes for each of its tokens, seconds."""


class Simulated(Classifier):
    """A replica whose ranks sleep, and which tells Serve's routers how many tokens wait for it."""

    @staticmethod
    def executor(topology: Topology, spares: Sequence[str]) -> Executor:
        return FakeExecutor(topology, token_s=float(os.environ[TOKEN_S]))

    async def record_routing_stats(self) -> dict[str, float]:
        """Serve's hook."""
        return {"tokens": float(self._engine.queued_tokens)}


class Front:
    """A deployment that others are behind."""

    def __init__(self, behind: Any) -> None:
        self.behind = behind


class Told(FewestTokens):
    """Goes by what the groups told Serve's controller last."""

    def waiting(self, replica: RunningReplica) -> float:
        return float(replica.routing_stats.get("tokens", 0.0))
