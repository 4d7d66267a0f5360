"""TorchNeuron (Trn2, Trn3): the device ``neuron``, its process group, and ``torch.compile(backend="neuron")``.

A shard is exported on the CPU, one program for each bucket; what is compiled, on the device, is the exported program,
when it is traced and again, from the cache that the artifact carries, wherever it is loaded. A compile runs the program
once, so that all ranks must trace together.

Sources: torch-neuronx 2.13's documentation, and TorchNeuron's public source: ``distributed/backend.py`` and
``neuron_dynamo_backend``. What only hardware can show is in the README.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.export import ExportedProgram

from tpray.config import neff_cache
from tpray.errors import ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.collective import accumulate_dtype
from tpray.platforms.neuron import check_installed
from tpray.platforms.topology import Topology
from tpray.runtime.base import Program, Report, SavedShard, SavedUserModel, no_report
from tpray.runtime.buckets import Bucket
from tpray.runtime.exported import as_module, export, inputs_of, load_programs, record_program, save_programs
from tpray.runtime.neuron import graph
from tpray.runtime.neuron.graph import Collectives, compile_error
from tpray.runtime.records import ProgramRecord
from tpray.runtime.shaped import ShapedProgram

NEFF_DIR = "neff"
JOIN_TIMEOUT_S = 50.0  # within what a group has for its phase "connect"
DEVICE = "neuron"  # never with an index: a process sees its own cores only

Compiled = Callable[..., Sequence[Tensor]]


def _everyone() -> Any:
    return dist.group.WORLD  # None, as its type says, only before the group is made


def _all_reduce(x: Tensor) -> Tensor:
    wide = accumulate_dtype(x.dtype)  # neuronx-distributed's reduce_dtype
    total: Tensor = functional.all_reduce(x.to(wide), "sum", _everyone())
    return total.to(x.dtype)


def _all_gather(x: Tensor, dim: int, size: int) -> Tensor:
    gathered: Tensor = functional.all_gather_tensor(x, dim, _everyone())
    return gathered


def _collectives() -> Collectives:
    rank = dist.get_rank()

    def broadcast(x: Tensor, source: int) -> Tensor:
        """A sum to which only the source adds: there is no broadcast in ``fx/passes/collective_legalization.py``."""
        return _all_reduce(x if rank == source else torch.zeros_like(x))

    return Collectives(_all_reduce, _all_gather, broadcast)


class NeuronRuntime:
    """See `tpray.runtime.base.Runtime`."""

    attention = "sdpa"

    def __init__(self, topology: Topology, first_core: int | None = None) -> None:
        assert first_core is None, "a process for each rank: the platform refuses the other layout"

    def join(self, rank: int, size: int) -> None:
        """The process group comes before any use of the device: it starts the runtime, on all ranks together."""
        check_installed("neuron")
        import torch_neuronx  # noqa: F401  # registers the device, the backend and the compiler

        dist.init_process_group(DEVICE, rank=rank, world_size=size, timeout=timedelta(seconds=JOIN_TIMEOUT_S))

    def trace(
        self,
        shard: nn.Module,
        max_length: int,
        directory: Path,
        buckets: Sequence[Bucket],
        report: Report = no_report,
        in_int8: Callable[[str], bool] | None = None,
    ) -> None:
        examples = [inputs_of(bucket) for bucket in buckets]
        self._save(export(shard, examples), examples, directory, report)

    def load(self, saved: SavedShard) -> Program:
        programs = self._open(saved.directory, len(saved.buckets))
        compiled = _compile(programs, [inputs_of(bucket) for bucket in saved.buckets], saved.rank)
        return ShapedProgram.of_buckets(saved.buckets, [_on_device(f) for f in compiled])

    def trace_user_model(
        self,
        module: nn.Module,
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        compiler_args: tuple[str, ...] = (),
        aliases: Mapping[str, int] | None = None,
    ) -> list[ProgramRecord]:
        if aliases:
            raise ConfigError("io_aliases are not supported on the runtime neuron: trace on neuron-xla, or on cpu")
        if compiler_args:
            raise ConfigError(
                f"the runtime neuron compiles with torch.compile, which takes no compiler_args such as "
                f"{compiler_args[0]!r}: leave them out"
            )
        programs = export(module, examples)
        self._save(programs, examples, directory, no_report)
        return [record_program(program, example) for program, example in zip(programs, examples, strict=True)]

    def load_user_model(self, saved: SavedUserModel) -> Program:
        programs = self._open(saved.directory, len(saved.programs))
        return ShapedProgram.of_records(saved.programs, [_on_device(f) for f in _wrap(programs)])

    def _save(
        self,
        programs: Sequence[ExportedProgram],
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        report: Report,
    ) -> None:
        save_programs(programs, directory)
        rank = parallel_state.get_tensor_model_parallel_rank()
        _compile(load_programs(directory, len(programs)), examples, rank, report)
        for path in neff_cache().rglob("*"):
            if path.suffix == ".lock" or not path.is_file():
                continue
            target = directory / NEFF_DIR / path.relative_to(neff_cache())
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another rank's compiler has just given it its name
                shutil.copyfile(path, target)

    def _open(self, directory: Path, count: int) -> list[ExportedProgram]:
        """The programs, with what was compiled for them put where the compiler looks."""
        for path in sorted((directory / NEFF_DIR).rglob("*")):
            target = neff_cache() / path.relative_to(directory / NEFF_DIR)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.{os.getpid()}")
                shutil.copyfile(path, part)
                part.rename(target)
        return load_programs(directory, count)


def _compile(
    programs: Sequence[ExportedProgram], examples: Sequence[tuple[Tensor, ...]], rank: int, report: Report = no_report
) -> list[Compiled]:
    """Compile programs by running each once, which all ranks do together; from the cache, if that has them.

    Raises:
        CompileError: the compiler failed.
    """
    what = "its shard"
    try:
        compiled = _wrap(programs)
        for f, example in zip(compiled, examples, strict=True):
            what = graph.program_for(example)
            with torch.inference_mode():
                _on_device(f)(*example)
            report(what)
    except Exception as e:
        raise compile_error(rank, what, e, None) from e
    return compiled


def _wrap(programs: Sequence[ExportedProgram]) -> list[Compiled]:
    """Programs of one shard, compiled by their first calls; the weights that they share are on the device once."""
    moved: dict[Any, tuple[Tensor, Tensor]] = {}  # with the original, whose address must not be given to another

    def move(x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.dtype, x.shape, x.stride())
        if key not in moved:
            moved[key] = x, x.to(DEVICE)
        return moved[key][1]

    compiled = []
    for program in programs:
        module = as_module(program)
        graph.lower(module, torch.device(DEVICE), _collectives())
        module._apply(move)  # what Module.to does, with a move of our own
        # Its forward, not its call: that one catches an error to explain it, in code that Dynamo then stumbles over.
        compiled.append(torch.compile(module.forward, backend="neuron", fullgraph=True, dynamic=False))
    return compiled


def _on_device(compiled: Compiled) -> Compiled:
    return lambda *inputs: _to_host(compiled(*(x.to(DEVICE) for x in inputs)))


def _to_host(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    parts = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [part.to("cpu") for part in parts]
