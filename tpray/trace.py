"""The calls of AWS's tensor-parallel inference tutorial, over a group of Ray actors.

Source: neuronx-distributed's ``trace.parallel_model_trace``, ``parallel_model_save`` and ``parallel_model_load``, which
its library has ended. A script moves here by changing its imports. Nothing in it needs ``if __name__ == "__main__"``:
Ray ships the function by value, so that it may also be defined in a notebook.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tpray.artifacts.folder import UserModelArtifact
from tpray.artifacts.manifest import MANIFEST_FILE
from tpray.config import ParallelConfig
from tpray.errors import ConfigError, NotReadyError
from tpray.group.channel import StepResult
from tpray.group.executor import Executor
from tpray.group.jobs import MakeModel
from tpray.group.loop_thread import LoopThread
from tpray.group.user_model import UserModelGroup, UserModelTask
from tpray.group.wire import Array
from tpray.platforms.cores import usable_cores
from tpray.platforms.topology import Topology
from tpray.runtime.user_model import as_array, record_of

Example = tuple[Tensor, ...]
MakeExecutor = Callable[[int], Executor]


class ParallelModel:
    """A traced model on its group of ranks; call it with tensors of a traced shape.

    The ranks come up with the first call, or with ``start``, and end with ``close``, with the ``with`` block, or when
    nothing refers to the model any more. State tensors live on the ranks: they start anew when the ranks do.
    """

    def __init__(self, artifact: UserModelArtifact, make_executor: MakeExecutor | None = None) -> None:
        self.artifact = artifact
        self._make_executor = make_executor or _ray_executor
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

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Rank 0's outputs, flat and in order, without those that io_aliases keeps on the rank.

        Args:
            inputs: tensors of the shapes and dtypes of one of the examples that were traced.

        Raises:
            ConfigError: they are of other shapes or dtypes; the message names those that were traced.
            StepError: the model raised, on all ranks alike; the group goes on.
            GroupError: a rank failed; the group starts again, with its first state, and the next call waits for that.
        """
        records = tuple(record_of(tensor) for tensor in inputs)
        program = next((p for p in self.artifact.manifest.programs if p.inputs == records), None)
        if program is None:
            raise ConfigError(f"no program was traced for {_shown(records)}; {_traced(self.artifact)}")
        self.start()
        group = self._group
        assert group is not None, "start() makes it"
        result = self._loop.run(_step_when_ready(group, [as_array(x) for x in inputs]))
        kept = set(self.artifact.manifest.aliases.values())
        dtypes = [record.dtype for i, record in enumerate(program.outputs) if i not in kept]
        return tuple(
            torch.from_numpy(array.copy()).to(getattr(torch, dtype))
            for array, dtype in zip(result.outputs, dtypes, strict=True)
        )

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


def parallel_model_trace(
    func: MakeModel,
    example_inputs: Example | Sequence[Example],
    tp_degree: int = 1,
    compiler_workdir: object = None,
    compiler_args: object = None,
    executor: MakeExecutor | None = None,
) -> ParallelModel:
    """Build a model on every rank and trace it there.

    Args:
        func: called without arguments on each rank, with `parallel_state` set; returns the model, or the model and its
            io_aliases ``{state tensor: number of the output that becomes its next value}``. It runs in the caller's
            working directory.
        example_inputs: the model's positional inputs; or a list of such tuples, one for each set of shapes that the
            model shall take (buckets). Programs share their state, not the weights that they pack for themselves.
        tp_degree: how many ranks share the model.
        compiler_workdir, compiler_args: upstream's, taken and not used: nothing is compiled for CPU cores.
        executor: given a degree, what starts the ranks, when they are not to be Ray actors.

    Raises:
        TraceError: ``func`` or the model raised on a rank, or cannot be traced; the first rank's words, once.
        ConfigError: the examples are not tensors, or io_aliases do not fit the model.
    """
    given: list[Any] = [] if isinstance(example_inputs, Tensor) else list(example_inputs)
    examples = [tuple(given)] if given and all(map(torch.is_tensor, given)) else given
    if not examples or not all(isinstance(e, (tuple, list)) and e and all(map(torch.is_tensor, e)) for e in examples):
        raise ConfigError("example_inputs is a tuple of tensors, or a list of such tuples, one for each bucket")
    directory = Path(tempfile.mkdtemp(prefix="tpray-trace-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    task = UserModelTask(func, [tuple(example) for example in examples], directory)
    loop = LoopThread("tpray-trace")
    try:
        group = UserModelGroup(task, (executor or _ray_executor)(tp_degree))
        try:
            loop.run(group.start())
        finally:
            # The ranks give their cores back: a script that saves and loads would wait for them otherwise.
            loop.run(group.stop())
    finally:
        loop.stop()
    return ParallelModel(group.artifact, executor)


def parallel_model_save(model: ParallelModel, save_dir: str | Path) -> None:
    """Write the traced model to a folder, one subfolder a rank.

    Raises:
        ConfigError: the folder holds something else.
    """
    target = Path(save_dir)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST_FILE).is_file())):
        raise ConfigError(f"{target} exists and is not a traced model: name another folder")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    shutil.copytree(model.artifact.directory, staging, dirs_exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


def parallel_model_load(model_dir: str | Path, executor: MakeExecutor | None = None) -> ParallelModel:
    """Read what `parallel_model_save` wrote, and bring its ranks up.

    Raises:
        ArtifactError: the folder is damaged, altered, of another version or not a traced model.
    """
    return ParallelModel(UserModelArtifact.open(Path(model_dir)), executor).start()


def _ray_executor(tp: int) -> Executor:
    from tpray.group.ray_executor import RayExecutor
    from tpray.local_ray.local import ensure_ray

    topology = Topology.of(ParallelConfig(tp=tp))
    if ensure_ray(max(len(usable_cores()), tp * topology.threads)):
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
