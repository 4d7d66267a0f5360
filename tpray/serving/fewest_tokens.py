"""Which group gets a request that a handle sends: the one that has the fewest tokens of this handle's to answer.

Serve's own router takes the better of two at random, by how many requests they have; one of 512 tokens counts as one of
8 then. A router sees only what its own handle sends; what groups tell Serve's controller, and that the handles, comes
too late: until then all send to the same group. Where HAProxy chooses, Serve takes no router.

Source: https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

CHARACTERS_PER_TOKEN = 4
"""Roughly; only which is more counts."""


class FewestTokens(FIFOMixin, RequestRouter):
    """A Serve request router; see above."""

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
        tokens = 1 + _characters(pending_request.args[0] if pending_request.args else "") // CHARACTERS_PER_TOKEN
        self._of_request[pending_request.metadata.internal_request_id] = tokens
        self._tokens[replica_id] += tokens

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve's hook."""
        self._tokens[replica_id] -= self._of_request.pop(internal_request_id, 0)


def _characters(sent: Any) -> int:
    """Of a text, of texts, or of an HTTP request that is passed on."""
    body = getattr(sent, "body", sent)
    return len(body) if isinstance(body, str | bytes) else len(str(body))
