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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpray.config import compiler_cache
from tpray.errors import ArtifactError, ConfigError
from tpray.parallel_layers import parallel_state
from tpray.platforms.neuron import check_installed
from tpray.platforms.topology import Topology
from tpray.runtime.base import Program, Report, SavedShard, SavedUserModel, no_report
from tpray.runtime.buckets import Bucket
from tpray.runtime.exported import export, inputs_of, record_program
from tpray.runtime.neuron import graph
from tpray.runtime.neuron.graph import Collectives, compile_error, remove_stale_locks
from tpray.runtime.records import ProgramRecord
from tpray.runtime.shaped import ShapedProgram

WORK_DIR = "compiler"
COMPILER_LOG = "log-neuron-cc.txt"


def program_file(rank: int, number: int) -> str:
    """What the file of a rank's program ``number``, from 0, is called."""
    return f"tp_{rank}.pt" if number == 0 else f"tp_{rank}_{number}.pt"


class NeuronXlaRuntime:
    """See `tpray.runtime.base.Runtime`."""

    attention = "eager"  # XLA fuses what it knows the parts of

    def __init__(self, topology: Topology, first_core: int | None = None) -> None:
        self._topology, self._first_core = topology, first_core

    def join(self, rank: int, size: int) -> None:
        """Join XLA's group of processes, which threads of one process do not need."""
        check_installed("neuron-xla")
        import torch_neuronx  # noqa: F401
        import torch_xla.distributed.xla_backend  # noqa: F401  # registers the backend "xla"

        if self._first_core is None and size > 1:
            torch.distributed.init_process_group("xla", rank=rank, world_size=size)

    def trace(
        self, shard: nn.Module, max_length: int, directory: Path, buckets: Sequence[Bucket], report: Report = no_report
    ) -> None:
        self._trace(shard, [inputs_of(bucket) for bucket in buckets], directory, report)

    def load(self, saved: SavedShard) -> Program:
        modules = self._load(saved.directory, saved.rank, saved.tp, len(saved.buckets))
        return ShapedProgram.of_buckets(saved.buckets, modules)

    def trace_user_model(
        self,
        module: nn.Module,
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        compiler_args: tuple[str, ...] = (),
        aliases: Mapping[str, int] | None = None,
    ) -> list[ProgramRecord]:
        return self._trace(module, examples, directory, no_report, compiler_args)

    def load_user_model(self, saved: SavedUserModel) -> Program:
        if saved.aliases:
            raise ConfigError("io_aliases are not supported on the runtime neuron-xla: trace with runtime='cpu'")
        modules = self._load(saved.directory, saved.rank, saved.tp, len(saved.programs))
        return ShapedProgram.of_records(saved.programs, modules)

    def _trace(
        self,
        module: nn.Module,
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        report: Report,
        compiler_args: tuple[str, ...] = (),
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

        remove_stale_locks(compiler_cache())
        records = []
        for number, (program, example) in enumerate(zip(export(module, examples), examples, strict=True)):
            module_graph: Any = program.module(check_guards=False)
            graph.lower(module_graph, xm.xla_device(), Collectives(all_reduce, all_gather, broadcast))
            work = directory.parent / WORK_DIR / f"rank_{state.rank:02d}_{number}"
            work.mkdir(parents=True, exist_ok=True)
            shown = ", ".join(str(list(x.shape)) for x in example)
            try:
                traced = torch_neuronx.trace(
                    module_graph,
                    example,
                    compiler_workdir=str(work),
                    compiler_args=[*self._compiler_args(), *compiler_args],
                )
            except Exception as e:
                kept = _keep_log(work / COMPILER_LOG)
                raise compile_error(state.rank, f"the program for {shown}", e, kept) from e
            torch.jit.save(traced, str(directory / program_file(state.rank, number)))
            shutil.rmtree(work, ignore_errors=True)
            report(f"the program for {shown}")
            records.append(record_program(program, example))
        return records

    def _compiler_args(self) -> list[str]:
        """No casts that were not asked for, so that float32 stays float32; and the cores' own kind."""
        chosen = ["--model-type=transformer", "--auto-cast=none"]
        chosen += [f"--target={self._topology.instance_family}"] if self._topology.instance_family else []
        return [*chosen, *([f"--lnc={self._topology.lnc}"] if self._topology.lnc else [])]

    def _load(self, directory: Path, rank: int, tp: int, count: int) -> list[Any]:
        import torch_neuronx

        core = self._first_core or 0  # cores are counted within the process
        modules = []
        for number in range(count):
            path = directory / program_file(rank, number)
            try:
                with torch_neuronx.contexts.disable_nrt_load():
                    module = torch.jit.load(str(path))
            except (OSError, RuntimeError, ValueError) as e:
                raise ArtifactError(f"{path} is not a traced module: {e}") from e
            torch.ops.neuron._load_collectives_neuron(module.model, core, 1, rank, tp)
            torch_neuronx.move_trace_to_device(module, core)
            modules.append(module)
        return modules


def _keep_log(path: Path) -> Path | None:
    """Move a compiler's log out of what is about to be removed."""
    if not path.is_file():
        return None
    kept = compiler_cache() / f"failed-{path.parent.name}-{os.getpid()}.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, kept)
    return kept
