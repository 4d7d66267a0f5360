"""Groups whose ranks sleep, so that two cores can show how sixteen groups queue; and the routers that were tried.

All else is real: Ray's nodes, Serve, HAProxy, the replicas with their tokenizers, queues and wires. A step takes as
long as its tokens call for (`tpray.group.fake_executor`).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tpray.group.executor import Executor
from tpray.group.fake_executor import FakeExecutor
from tpray.platforms.topology import Topology
from tpray.serving.app import Classifier

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


class FewestTokens(FIFOMixin, RequestRouter):
    """Sends a request to the group with the fewest tokens of what this router has sent and got no answer to.

    Source: https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
    """

    def initialize_state(self, **_: Any) -> None:
        """Serve's hook, called once."""
        self._tokens: Counter[ReplicaID] = Counter()
        self._of_request: dict[str, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook: the groups, best first; of equals any."""
        order = random.sample(candidate_replicas, len(candidate_replicas))
        return [[replica] for replica in sorted(order, key=self.waiting)]

    def waiting(self, replica: RunningReplica) -> float:
        """About how many tokens the group has still to answer."""
        return self._tokens[replica.replica_id]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve's hook."""
        tokens = 1 + len(str(pending_request.args)) // 4
        self._of_request[pending_request.metadata.internal_request_id] = tokens
        self._tokens[replica_id] += tokens

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve's hook."""
        self._tokens[replica_id] -= self._of_request.pop(internal_request_id, 0)


class Told(FewestTokens):
    """Goes by what the groups told Serve's controller last."""

    def waiting(self, replica: RunningReplica) -> float:
        return float(replica.routing_stats.get("tokens", 0.0))
