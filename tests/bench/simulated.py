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


class ByTokens(FIFOMixin, RequestRouter):
    """Sends a request to the group for which the fewest tokens wait.

    Two sources: what the groups told Serve's controller last (``told``), and what this router has sent that is not
    answered yet (``sent``; four characters are taken for a token).
    """

    def initialize_state(self, **kwargs: bool) -> None:
        self._told, self._count_sent = kwargs["told"], kwargs["sent"]
        self._waiting: Counter[ReplicaID] = Counter()
        self._sizes: dict[str, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        random.shuffle(order := list(candidate_replicas))  # of equals any
        return [[replica] for replica in sorted(order, key=self._tokens)]

    def _tokens(self, replica: RunningReplica) -> float:
        told = replica.routing_stats.get("tokens", 0.0) if self._told else 0.0
        return float(told) + self._waiting[replica.replica_id]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if self._count_sent:
            size = len(str(pending_request.args)) // 4
            self._sizes[pending_request.metadata.internal_request_id] = size
            self._waiting[replica_id] += size

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._waiting[replica_id] -= self._sizes.pop(internal_request_id, 0)
