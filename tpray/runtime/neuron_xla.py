"""torch-neuronx on torch-xla (Inf2, Trn1, also Trn2): ``torch_neuronx.trace``, one TorchScript module for each bucket.

Every rank traces alone, its collectives written as XLA's over the group's ranks, and saves ``tp_{rank}.pt``; a program
after the first, for another bucket, is ``tp_{rank}_{number}.pt``. Loading binds the module to its core and rank, which
the runtime does for all ranks together.

Two layouts: a process for each rank, each with its own cores, as the runtime allows; or one process that holds the
cores of the group and a thread for each rank, which is what neuronx-distributed did.

Source: torch-neuronx 2.9's tracing API, and the calls of neuronx-distributed's trace module.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpray.config import DtypeName, RuntimeName
from tpray.errors import ArtifactError, ConfigError
from tpray.parallel_layers import parallel_state
from tpray.runtime import neuron_graph
from tpray.runtime.artifact import Artifact, FunctionArtifact, ProgramRecord
from tpray.runtime.base import Program, Tell, silent
from tpray.runtime.buckets import Bucket
from tpray.runtime.function import FunctionProgram
from tpray.runtime.neuron_env import NeuronPlace, check_installed
from tpray.runtime.neuron_graph import Collectives, compile_error, remove_stale_locks
from tpray.runtime.program import export, inputs_of, record_program

WORK_DIR = "compiler"
COMPILER_LOG = "log-neuron-cc.txt"


def program_file(rank: int, number: int) -> str:
    """What the file of a rank's program ``number``, from 0, is called."""
    return f"tp_{rank}.pt" if number == 0 else f"tp_{rank}_{number}.pt"


class XlaProgram:
    """One traced module for each bucket, bound to this rank's core."""

    packs_rows = False

    def __init__(self, modules: dict[Bucket, Callable[..., Any]]) -> None:
        self._modules = modules

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Logits ``[B, L]`` for ids, mask and types int64 ``[B, S]`` of a bucket's shape."""
        batch, length = inputs[0].shape
        return _outputs(self._modules[Bucket(batch, length)](*inputs))


class NeuronXlaRuntime:
    """See `tpray.runtime.base.Runtime`."""

    name: RuntimeName = "neuron-xla"
    attention = "eager"  # XLA fuses what it knows the parts of
    compiles_alone = True

    def __init__(self, place: NeuronPlace) -> None:
        self._place = place

    def choose_dtype(self, asked: DtypeName) -> str:
        return neuron_graph.choose_dtype(asked)

    def default_buckets(self, max_length: int) -> tuple[Bucket, ...]:
        return neuron_graph.default_buckets(max_length)

    def warm_up_shapes(self, max_length: int) -> Sequence[tuple[int, int]]:
        return self.default_buckets(max_length)

    def join(self, rank: int, size: int) -> None:
        """XLA's group of processes; threads of one process have none."""
        check_installed(self.name)
        import torch_neuronx  # noqa: F401
        import torch_xla.distributed.xla_backend  # noqa: F401  # registers the backend "xla"

        if self._place.first_core is None and size > 1:
            torch.distributed.init_process_group("xla", rank=rank, world_size=size)

    def trace(
        self, shard: nn.Module, max_length: int, directory: Path, buckets: Sequence[Bucket] = (), tell: Tell = silent
    ) -> None:
        self._trace(shard, [inputs_of(b) for b in buckets or self.default_buckets(max_length)], directory, tell)

    def load(self, artifact: Artifact, rank: int) -> Program:
        buckets = artifact.manifest.buckets
        modules = self._load(artifact.rank_directory(rank), rank, artifact.manifest.tp, len(buckets))
        return XlaProgram(dict(zip(buckets, modules, strict=True)))

    def trace_function(
        self, module: nn.Module, examples: Sequence[tuple[Tensor, ...]], directory: Path
    ) -> list[ProgramRecord]:
        return self._trace(module, examples, directory, silent)

    def _trace(
        self, module: nn.Module, examples: Sequence[tuple[Tensor, ...]], directory: Path, tell: Tell
    ) -> list[ProgramRecord]:
        import torch_neuronx
        import torch_xla.core.xla_model as xm

        state = parallel_state.current()
        groups = [list(range(state.size))]

        def all_reduce(x: Tensor) -> Tensor:
            wide = torch.float32 if x.dtype is torch.bfloat16 else x.dtype  # neuronx-distributed's reduce_dtype
            total: Tensor = xm.all_reduce(xm.REDUCE_SUM, x.to(wide), groups=groups)
            return total.to(x.dtype)

        def all_gather(x: Tensor, dim: int, size: int) -> Tensor:
            gathered: Tensor = xm.all_gather(x, dim=dim, groups=groups)
            return gathered

        def broadcast(x: Tensor, source: int) -> Tensor:
            return all_reduce(x if state.rank == source else torch.zeros_like(x))

        remove_stale_locks(Path(os.environ["NEURON_COMPILE_CACHE_URL"]))
        records = []
        for number, (program, example) in enumerate(zip(export(module, examples), examples, strict=True)):
            graph: Any = program.module(check_guards=False)
            neuron_graph.lower(graph, xm.xla_device(), Collectives(all_reduce, all_gather, broadcast))
            work = directory.parent / WORK_DIR / f"rank_{state.rank:02d}_{number}"
            work.mkdir(parents=True, exist_ok=True)
            shown = ", ".join(str(list(x.shape)) for x in example)
            try:
                traced = torch_neuronx.trace(
                    graph, example, compiler_workdir=str(work), compiler_args=self._compiler_args()
                )
            except Exception as e:
                kept = _keep_log(work / COMPILER_LOG)
                raise compile_error(state.rank, f"the program for {shown}", e, kept) from e
            torch.jit.save(traced, str(directory / program_file(state.rank, number)))
            shutil.rmtree(work, ignore_errors=True)
            tell(f"the program for {shown}")
            records.append(record_program(program, example))
        return records

    def load_function(self, artifact: FunctionArtifact, rank: int) -> FunctionProgram:
        if artifact.manifest.aliases:
            raise ConfigError("io_aliases are not supported on the runtime neuron-xla: trace with runtime='cpu'")
        records = artifact.manifest.programs
        modules = self._load(artifact.rank_directory(rank), rank, artifact.manifest.tp, len(records))
        return FunctionProgram([lambda *x, m=m: _outputs(m(*x)) for m in modules], records, {})

    def _compiler_args(self) -> list[str]:
        """No casts that were not asked for, so that float32 stays float32; and the cores' own kind."""
        chosen = ["--model-type=transformer", "--auto-cast=none"]
        chosen += [f"--target={self._place.family}"] if self._place.family else []
        return [*chosen, *([f"--lnc={self._place.lnc}"] if self._place.lnc else [])]

    def _load(self, directory: Path, rank: int, tp: int, count: int) -> list[Any]:
        import torch_neuronx

        core = self._place.first_core or 0  # cores are counted within the process
        modules = []
        for number in range(count):
            path = directory / program_file(rank, number)
            try:
                with torch_neuronx.contexts.disable_nrt_load():
                    module = torch.jit.load(str(path))
            except (OSError, RuntimeError, ValueError) as e:
                raise ArtifactError(f"{path} is no traced module: {e}") from e
            torch.ops.neuron._load_collectives_neuron(module.model, core, 1, rank, tp)
            torch_neuronx.move_trace_to_device(module, core)
            modules.append(module)
        return modules


def _outputs(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _keep_log(path: Path) -> Path | None:
    """Move a compiler's log out of what is about to be removed."""
    if not path.is_file():
        return None
    kept = Path(os.environ["NEURON_COMPILE_CACHE_URL"]) / f"failed-{path.parent.name}-{os.getpid()}.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, kept)
    return kept
