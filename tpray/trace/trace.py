"""The calls of AWS's tensor-parallel inference tutorial, over a group of Ray actors.

Source: neuronx-distributed's ``trace.parallel_model_trace``, ``parallel_model_save`` and ``parallel_model_load``, which
its library has ended. A script moves here by changing its imports. Nothing in it needs ``if __name__ == "__main__"``:
Ray ships the function by value, so that it may also be defined in a notebook.
"""

from __future__ import annotations

import atexit
import functools
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpray.artifacts.folder import UserModelArtifact
from tpray.artifacts.manifest import MANIFEST_FILE
from tpray.errors import CheckpointError, ConfigError
from tpray.group.jobs import MakeModel
from tpray.group.loop_thread import LoopThread
from tpray.group.user_model import UserModelGroup, UserModelTask
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.preshard import (
    get_sharded_checkpoint,
    invoke_preshard_hook,
    preprocess_checkpoint,
    shard_children,
)
from tpray.parallel_layers.spmd_rank import SPMDRank
from tpray.runtime.structure import same_structure, take_apart
from tpray.trace.model import MakeExecutor, ParallelModel, ray_executor

__all__ = [
    "ParallelModel",
    "get_sharded_checkpoint",
    "invoke_preshard_hook",
    "parallel_model_load",
    "parallel_model_save",
    "parallel_model_trace",
    "preprocess_checkpoint",
    "shard_children",
]

__SUPPORTED_SHARDED_MODULES: tuple[type, ...] = ()
"""Scripts add their own layers here; `shard_children` asks each parameter, whatever module it is of."""

LoadCheckpoint = Callable[[], dict[str, Tensor]]


def parallel_model_trace(
    func: MakeModel,
    example_inputs: Any,
    states: object = None,
    compiler_workdir: str | Path | None = None,
    compiler_args: Sequence[str] | str | None = None,
    inline_weights_to_neff: bool = True,
    bucket_config: object = None,
    tp_degree: int = 1,
    max_parallel_compilations: int | None = None,
    spmd_mode: bool = False,
    checkpoint_loader_callable: LoadCheckpoint | None = None,
    force_custom_init_on_device: bool = False,
    serialization_path: str | Path | None = None,
    *,
    executor: MakeExecutor | None = None,
) -> ParallelModel:
    """Build a model on every rank and trace it there.

    Args:
        func: called without arguments on each rank, with `parallel_state` set; returns the model, or the model and its
            io_aliases ``{state tensor: number of the output that becomes its next value}``. It runs in the caller's
            working directory.
        example_inputs: the model's positional inputs as a tuple, or the one that it has. An input is a tensor, or
            tuples, lists and dicts of tensors. A list of such tuples traces one program for each, so that the model
            takes each of these sets of shapes; the programs share their state, not the weights that they pack for
            themselves.
        states: refused: the model registers its states as buffers and names them in its io_aliases.
        compiler_workdir: not used: a compiler works in a folder of the rank's, and its log is shown where it fails.
        compiler_args: added to those of Neuron's compiler, as a list or one string; on CPU cores nothing is compiled.
        inline_weights_to_neff: not used: a saved model has its weights in files of their own.
        bucket_config: refused: give a list of example tuples.
        tp_degree: how many ranks share the model.
        max_parallel_compilations: not used: as many ranks trace at once as the machine has memory for.
        spmd_mode: ``func`` leaves its weights as they are, and each rank takes its part of the checkpoint that
            ``checkpoint_loader_callable`` returns. Each rank traces itself, while upstream traces one for all.
        checkpoint_loader_callable: with ``spmd_mode``, called on each rank; returns whole tensors by their names.
        force_custom_init_on_device: not used: a rank builds the model on the CPU.
        serialization_path: with ``spmd_mode``, a folder that the model is also saved in.
        executor: given a degree, what starts the ranks, when they are not to be Ray actors.

    Raises:
        TraceError: ``func`` or the model raised on a rank, or cannot be traced; the first rank's words, once.
        ConfigError: an argument that is refused; the examples are not tensors; io_aliases do not fit the model.
    """
    if states is not None:
        raise ConfigError(
            "states are not given to parallel_model_trace: register them as buffers, name them in io_aliases"
        )
    if bucket_config is not None:
        raise ConfigError("there is no bucket_config: give a list of example tuples, one for each set of shapes")
    if spmd_mode and checkpoint_loader_callable is None:
        raise ConfigError("spmd_mode=True loads the weights itself: give checkpoint_loader_callable")
    if not spmd_mode and (checkpoint_loader_callable is not None or serialization_path is not None):
        raise ConfigError("checkpoint_loader_callable and serialization_path are of spmd_mode: give spmd_mode=True")
    arguments = shlex.split(compiler_args) if isinstance(compiler_args, str) else list(compiler_args or ())
    if not all(isinstance(argument, str) for argument in arguments):
        raise ConfigError("compiler_args is a list of strings, or one string")
    taken = [take_apart(example, "example_inputs", constants=False) for example in _examples(example_inputs)]
    inputs = same_structure([structure for _, structure in taken])
    if len({tuple(tensor.dtype for tensor in tensors) for tensors, _ in taken}) > 1:
        raise ConfigError("all example tuples have the same dtypes, one after another: trace a model for each set")
    make = func if checkpoint_loader_callable is None else _filled(func, checkpoint_loader_callable)
    directory = Path(tempfile.mkdtemp(prefix="tpray-trace-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    task = UserModelTask(make, [tuple(tensors) for tensors, _ in taken], inputs, directory, tuple(arguments))
    loop = LoopThread("tpray-trace")
    try:
        ranks = (executor or ray_executor)(tp_degree)
        ranks.topology = ranks.topology.for_tracing()  # nothing is run here: where that takes no cores, none are taken
        group = UserModelGroup(task, ranks)
        try:
            loop.run(group.start())
        finally:
            # The ranks give their cores back: a script that saves and loads would wait for them otherwise.
            loop.run(group.stop())
    finally:
        loop.stop()
    model = ParallelModel(group.artifact, executor)
    if serialization_path is not None:
        parallel_model_save(model, serialization_path)
    return model


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


def _examples(given: Any) -> list[tuple[Any, ...]]:
    """The positional inputs of each program."""
    if isinstance(given, (Tensor, dict)):
        return [(given,)]
    if not isinstance(given, (tuple, list)) or not given:
        raise ConfigError(
            "example_inputs is a tensor, a tuple of inputs, or a list of such tuples, one for each bucket"
        )
    several = isinstance(given, list) and all(isinstance(example, tuple) and example for example in given)
    return list(given) if several else [tuple(given)]


def _filled(func: MakeModel, load: LoadCheckpoint) -> MakeModel:
    """``func`` with its model's weights taken from what ``load`` returns."""

    @functools.wraps(func)
    def make() -> Any:
        made = func()
        model, aliases = made if isinstance(made, tuple) else (made, {})
        checkpoint = dict(load())
        state = parallel_state.current()
        get_sharded_checkpoint(checkpoint, model, state.rank, state.size)
        known = {id(tensor) for tensor in aliases} | {id(m.rank) for m in model.modules() if isinstance(m, SPMDRank)}
        missing = [name for name, p in model.named_parameters() if name not in checkpoint and id(p) not in known]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors of a {type(model).__name__}, among them "
                f"{', '.join(missing[:4])}"
            )
        nn.Module.load_state_dict(model, checkpoint, strict=False)
        return model, aliases

    return make
