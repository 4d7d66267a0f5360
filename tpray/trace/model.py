"""A user's own model that was traced, to be called: the object that the calls of `tpray.trace` return."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tpray.artifacts.folder import UserModelArtifact
from tpray.config import ParallelConfig
from tpray.errors import ConfigError, NotReadyError
from tpray.group.channel import StepResult
from tpray.group.executor import Executor
from tpray.group.loop_thread import LoopThread
from tpray.group.user_model import UserModelGroup
from tpray.group.wire import Array
from tpray.platforms.cores import core_count
from tpray.platforms.topology import Topology
from tpray.runtime.structure import take_apart
from tpray.runtime.user_model import as_array, record_of

MakeExecutor = Callable[[int], Executor]


class ParallelModel:
    """A traced model on its group of ranks; call it with tensors of a traced shape.

    The ranks come up with the first call, or with ``start``, and end with ``close``, with the ``with`` block, or when
    nothing refers to the model any more. State tensors live on the ranks: they start anew when the ranks do.
    """

    def __init__(self, artifact: UserModelArtifact, make_executor: MakeExecutor | None = None) -> None:
        self.artifact = artifact
        self._make_executor = make_executor or ray_executor
        self._lock = threading.Lock()
        self._group: UserModelGroup | None = None
        self._end: weakref.finalize[..., Any] | None = None

    @property
    def tp_degree(self) -> int:
        """How many ranks share the model."""
        return self.artifact.manifest.tp

    def start(self) -> ParallelModel:
        """Bring the ranks up now rather than with the first call."""
        with self._lock:
            if self._group is None:
                loop = LoopThread("tpray-model")
                group = UserModelGroup(self.artifact, self._make_executor(self.tp_degree))
                try:
                    loop.run(group.start())
                except BaseException:
                    loop.stop()
                    raise
                self._loop, self._group = loop, group
                self._end = weakref.finalize(self, _stop, loop, group)
                self._end.atexit = False  # `_shut_down` does it, before Ray goes
                _started.add(self)
        return self

    def __call__(self, *inputs: Any) -> Any:
        """What the model returns on rank 0, held as the model holds it, without what io_aliases keeps on the rank.

        Args:
            inputs: as those of one of the examples that were traced: tensors of its shapes and dtypes, held alike.

        Raises:
            ConfigError: they are held otherwise, or of other shapes or dtypes; the message names what was traced.
            StepError: the model raised, on all ranks alike; the group goes on.
            GroupError: a rank failed; the group starts again, with its first state, and the next call waits for that.
        """
        manifest = self.artifact.manifest
        tensors, structure = take_apart(inputs, "inputs", constants=False)
        if structure != manifest.inputs:
            raise ConfigError(f"the model was traced for inputs {manifest.inputs}, and these are {structure}")
        records = tuple(record_of(tensor) for tensor in tensors)
        number = next((i for i, p in enumerate(manifest.programs) if p.inputs == records), None)
        if number is None:
            raise ConfigError(f"no program was traced for {_shown(records)}; {_traced(self.artifact)}")
        self.start()
        group = self._group
        assert group is not None, "start() makes it"
        result = self._loop.run(_step_when_ready(group, [as_array(x) for x in tensors]))
        kept = set(manifest.aliases.values())
        dtypes = [record.dtype for i, record in enumerate(manifest.programs[number].outputs) if i not in kept]
        outputs: list[Tensor] = [
            torch.from_numpy(array.copy()).to(getattr(torch, dtype))
            for array, dtype in zip(result.outputs, dtypes, strict=True)
        ]
        return manifest.outputs[number].without(kept).build(iter(outputs))

    def close(self) -> None:
        """End the ranks; a later call brings them up again."""
        with self._lock:
            if self._end is not None:
                self._end()
            self._group = self._end = None

    def __enter__(self) -> ParallelModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ray_executor(tp: int) -> Executor:
    from tpray.group.ray_executor import RayExecutor
    from tpray.local_ray.local import ensure_ray

    topology = Topology.of(ParallelConfig(tp=tp))
    if ensure_ray(max(core_count(), tp * topology.threads)):
        atexit.register(_shut_down)
    return RayExecutor(topology)


async def _step_when_ready(group: UserModelGroup, inputs: list[Array]) -> StepResult:
    while True:
        await group.lifecycle.until_ready()
        try:
            return await group.step(inputs)
        except NotReadyError:  # it was ready only in passing; nothing was sent
            continue


_started: weakref.WeakSet[ParallelModel] = weakref.WeakSet()


def _shut_down() -> None:
    """At the end of a script: the ranks of every model, then the Ray that was started for them."""
    from tpray.local_ray.local import stop_ray

    for model in list(_started):
        model.close()
    stop_ray()


def _stop(loop: LoopThread, group: UserModelGroup) -> None:
    loop.run(group.stop())
    loop.stop()


def _shown(records: Sequence[Any]) -> str:
    return ", ".join(f"{record.dtype} {list(record.shape)}" for record in records)


def _traced(artifact: UserModelArtifact) -> str:
    return "traced were " + " and ".join(f"({_shown(p.inputs)})" for p in artifact.manifest.programs)
