"""The protocol of an executor: what starts a group's ranks and calls them, until they answer steps on the wire.

`ray_executor` is the real one. `thread_executor` runs the same ranks in threads of this process. `fake_executor` has no
model at all: it speaks the real wire and fails on command.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from tpray.errors import TprayError
from tpray.group.jobs import Loaded, ShardJob, UserModelJob, UserModelTrace, WorkerInfo

if TYPE_CHECKING:
    from tpray.artifacts.folder import Artifact, UserModelArtifact
    from tpray.artifacts.manifest import RankRecord
    from tpray.parallel_layers.checkpoint import Checkpoint
    from tpray.platforms.topology import Topology
    from tpray.runtime.records import Canary

P = ParamSpec("P")
T = TypeVar("T")


class Executor(Protocol):
    """The ranks of one group. The calls are made in the order of the start-up phases, on the group's event loop.

    Every call that reaches a rank raises what the rank raised, if that is a `TprayError`, and else `RankError`.
    """

    topology: Topology  # a group puts another one here between `kill` and `spawn`, of the same cores

    async def place(self) -> None:
        """Reserve what the ranks need; nothing, if it is reserved."""
        ...

    async def spawn(self) -> list[WorkerInfo]:
        """Bring the ranks up, in the reserved place; again after `kill`."""
        ...

    async def pin(self) -> list[WorkerInfo]:
        """Give each rank CPU cores of its own where ranks are pinned; all ranks get them or none."""
        ...

    async def connect(self, address: str, token: str, timeout_s: float, wait_s: float) -> None:
        """Have every rank join the wire at ``address``; see `tpray.group.wire`.

        wait_s: how long a rank waits for another in a collective. Longer than any step, so that the owner, who can see
            which rank is behind, is the first to notice.
        """
        ...

    async def trace(self, jobs: Sequence[ShardJob]) -> list[RankRecord]:
        """Have each rank trace its shard; as many at a time as the machine can take."""
        ...

    async def make_canary(self, checkpoint: Checkpoint, max_length: int) -> Canary:
        """Have one rank run the unsharded model; see `tpray.runtime.canary`."""
        ...

    async def load(self, artifact: Artifact) -> Loaded:
        """Have each rank load its program; what they can do."""
        ...

    async def trace_user_model(self, jobs: Sequence[UserModelJob]) -> list[UserModelTrace]:
        """Have each rank trace a user's own model. What several ranks say of the user's code, the first one says."""
        ...

    async def load_user_model(self, artifact: UserModelArtifact) -> None:
        """Have each rank load its program of a user's own model."""
        ...

    async def kill(self) -> None:
        """End every rank and wait until it has ended."""
        ...

    def release(self) -> None:
        """Give back what `place` reserved."""
        ...


class Worker(Protocol):
    """The calls that a rank takes from an executor; `tpray.group.worker.ShardWorker` is one."""

    def info(self) -> WorkerInfo: ...

    def pin(self) -> tuple[int, ...]: ...

    def unpin(self) -> None: ...

    def connect(self, address: str, token: str, timeout_s: float, wait_s: float) -> None: ...

    def trace(self, job: ShardJob) -> RankRecord: ...

    def make_canary(self, checkpoint: Checkpoint, max_length: int) -> Canary: ...

    def load(self, artifact: Artifact) -> Loaded: ...

    def try_trace_user_model(self, job: UserModelJob) -> UserModelTrace | TprayError: ...

    def load_user_model(self, artifact: UserModelArtifact) -> None: ...


class WorkerExecutor(ABC):
    """An executor whose ranks are `Worker` objects, wherever they are; `call` is how one is reached."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    @abstractmethod
    async def call(
        self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], at_once: int | None = None
    ) -> list[T]:
        """Call a method of `Worker` on the first ranks, each with its own arguments.

        at_once: how many processes work at a time; the default is all.
        """

    async def _on_all(self, method: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        assert not kwargs, "arguments go by their places"
        return await self.call(method, [args] * self.topology.tp)

    async def connect(self, address: str, token: str, timeout_s: float, wait_s: float) -> None:
        await self._on_all(Worker.connect, address, token, timeout_s, wait_s)

    async def trace(self, jobs: Sequence[ShardJob]) -> list[RankRecord]:
        return await self.call(Worker.trace, [(job,) for job in jobs], self._traces_at_once)

    async def make_canary(self, checkpoint: Checkpoint, max_length: int) -> Canary:
        (canary,) = await self.call(Worker.make_canary, [(checkpoint, max_length)])
        return canary

    async def load(self, artifact: Artifact) -> Loaded:
        return Loaded.of_all(await self._on_all(Worker.load, artifact))

    async def trace_user_model(self, jobs: Sequence[UserModelJob]) -> list[UserModelTrace]:
        made = await self.call(Worker.try_trace_user_model, [(job,) for job in jobs], self._traces_at_once)
        for outcome in made:
            if isinstance(outcome, TprayError):
                raise outcome
        return [outcome for outcome in made if isinstance(outcome, UserModelTrace)]

    async def load_user_model(self, artifact: UserModelArtifact) -> None:
        await self._on_all(Worker.load_user_model, artifact)

    @property
    def _traces_at_once(self) -> int:
        return self.topology.platform.traces_at_once(self.topology.tp)
