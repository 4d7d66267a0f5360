"""torch-neuronx on torch-xla (Inf2, Trn1, also Trn2): ``torch_neuronx.trace``, one TorchScript module for each bucket.

Every rank traces alone, in a process that has no cores: torch-xla lowers on the CPU, and Neuron's compiler is told for
which family of cores. The collectives are XLA's over the group's ranks. A rank's modules are saved as ``tp_{rank}.pt``
and, for buckets after the first, ``tp_{rank}_{number}.pt``. Other processes load them: that binds a module to its core
and rank, which the runtime does for all ranks together.

Two layouts: a process for each rank, each with its own cores, as the runtime allows; or one process that holds the
cores of the group and a thread for each rank, which is what neuronx-distributed does.

Source: torch-neuronx 2.9's tracing API, and the calls of neuronx-distributed's trace module.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tpray.config import compiler_cache
from tpray.errors import ArtifactError, ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.collective import accumulate_dtype
from tpray.platforms.neuron import check_installed
from tpray.platforms.topology import Topology
from tpray.runtime.base import Program, Report, SavedShard, SavedUserModel, no_report
from tpray.runtime.buckets import Bucket
from tpray.runtime.exported import export, inputs_of, record_program
from tpray.runtime.neuron import graph, hlo
from tpray.runtime.neuron.graph import Collectives, compile_error, remove_stale_locks
from tpray.runtime.neuron.operators import REPLACEMENTS
from tpray.runtime.records import ProgramRecord
from tpray.runtime.shaped import Module, ShapedProgram

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
        """Nothing is joined: a rank traces by itself, and the cores meet when their programs are loaded."""
        check_installed("neuron-xla")
        import torch_neuronx  # noqa: F401  # registers the operators that load programs

    def trace(
        self,
        shard: nn.Module,
        max_length: int,
        directory: Path,
        buckets: Sequence[Bucket],
        report: Report = no_report,
        in_int8: Callable[[str], bool] | None = None,
    ) -> None:
        self._trace(shard, [inputs_of(bucket) for bucket in buckets], directory, report=report)

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
        if aliases and len(examples) > 1:
            raise ConfigError(
                "on NeuronCores each program has its own state: trace a model with io_aliases for one set of shapes"
            )
        return self._trace(module, examples, directory, compiler_args, aliases or {})

    def load_user_model(self, saved: SavedUserModel) -> Program:
        modules = self._load(saved.directory, saved.rank, saved.tp, len(saved.programs))
        kept = set(saved.aliases.values())
        whole = zip(saved.programs, modules, strict=True)
        return ShapedProgram.of_records(saved.programs, [_without(m, kept, len(p.outputs)) for p, m in whole])

    def _trace(
        self,
        module: nn.Module,
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        compiler_args: Sequence[str] = (),
        aliases: Mapping[str, int] | None = None,
        report: Report = no_report,
    ) -> list[ProgramRecord]:
        import torch_neuronx

        state = parallel_state.current()
        remove_stale_locks(compiler_cache())
        records = []
        programs = export(module, examples)
        if aliases is not None:
            _check_states(programs[0].run_decompositions({}), aliases)
        for number, (program, example) in enumerate(zip(programs, examples, strict=True)):
            what = graph.program_for(example)
            ready, collectives = prepare(program.module(check_guards=False), state.rank, state.size)
            work = directory.parent / WORK_DIR / f"rank_{state.rank:02d}_{number}"
            work.mkdir(parents=True, exist_ok=True)
            with hlo.nothing_left_out():
                try:
                    lowered = hlo.lower(ready, example)
                except Exception as e:
                    raise compile_error(state.rank, what, e, None) from e
                hlo.check(lowered, collectives, state.size, f"rank {state.rank}: {what}")
                own = dict(ready.named_parameters()) | dict(ready.named_buffers())
                try:
                    traced = torch_neuronx.trace(
                        ready,
                        example,
                        input_output_aliases={own[name]: number for name, number in (aliases or {}).items()},
                        compiler_workdir=str(work),
                        compiler_args=[*self._compiler_args(work), *compiler_args],
                        cpu_backend=True,
                    )
                except Exception as e:
                    raise compile_error(state.rank, what, e, _keep_log(work / COMPILER_LOG)) from e
                finally:
                    hlo.forget_collectives()
            torch.jit.save(traced, str(directory / program_file(state.rank, number)))
            shutil.rmtree(work, ignore_errors=True)
            report(what)
            records.append(record_program(program, example))
        return records

    def _compiler_args(self, work: Path) -> list[str]:
        """No casts that were not asked for, so that float32 stays float32; the cores' own kind; and where it logs."""
        chosen = ["--model-type=transformer", "--auto-cast=none", f"--target={self._topology.instance_family}"]
        chosen += [f"--lnc={self._topology.lnc}"] if self._topology.lnc else []
        return [*chosen, f"--logfile={work / COMPILER_LOG}"]

    def _load(self, directory: Path, rank: int, tp: int, count: int) -> list[Any]:
        """Upstream's order: files one after another, then each rank's modules to its core, all ranks at once."""
        import torch_neuronx

        core = self._first_core or 0  # cores are counted within the process
        together = _Together.of(directory.parent, 1 if self._first_core is None else tp)
        modules = []
        with together.in_turn():
            for number in range(count):
                path = directory / program_file(rank, number)
                try:
                    with torch_neuronx.contexts.disable_nrt_load():  # which holds for the process, not for a thread
                        modules.append(torch.jit.load(str(path)))
                except (OSError, RuntimeError, ValueError) as e:
                    raise ArtifactError(f"{path} is not a traced module: {e}") from e
        together.wait()
        with together.at_once():
            for module in modules:
                torch.ops.neuron._load_collectives_neuron(module.model, core, 1, rank, tp)  # the first takes the core
        together.wait()
        with together.in_turn():
            for module in modules:
                torch_neuronx.move_trace_to_device(module, core)
        return modules


def _check_states(program: ExportedProgram, aliases: Mapping[str, int]) -> None:
    """Refuse states that would not be kept from call to call. program: a functional one, without changes in place.

    Raises:
        ConfigError: with the state's name.
    """
    if changed := program.graph_signature.buffers_to_mutate:
        name = next(iter(changed.values())).removeprefix("model.")
        raise ConfigError(
            f"the model changes its buffer {name} in place, which does not outlast a call on NeuronCores: return the "
            "new value, and name the buffer and the output in io_aliases"
        )
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    signature = program.graph_signature
    names = {own: target for target, own in (signature.inputs_to_parameters | signature.inputs_to_buffers).items()}
    for name in aliases:
        if names.get(name) not in used:
            raise ConfigError(
                f"io_aliases: the model never reads its state {name.removeprefix('model.')}: leave it out"
            )


def prepare(exported: Any, rank: int, ranks: int) -> tuple[GraphModule, int]:
    """An exported program as torch-xla lowers it, and how many collectives it has."""
    import torch_xla.core.xla_model as xm

    groups = [list(range(ranks))]

    def all_reduce(x: Tensor) -> Tensor:
        wide = accumulate_dtype(x.dtype)  # neuronx-distributed's reduce_dtype
        total: Tensor = xm.all_reduce(xm.REDUCE_SUM, x.to(wide), groups=groups)
        return total.to(x.dtype)

    def all_gather(x: Tensor, dim: int, size: int) -> Tensor:
        # A pinned one is an all-reduce of padded parts, each at its process's ordinal, which is 0 for all ranks here.
        gathered: Tensor = xm.all_gather(x, dim=dim, groups=groups, pin_layout=False)
        return gathered

    def broadcast(x: Tensor, source: int) -> Tensor:
        return all_reduce(torch.where(ready._tpray_rank == source, x, 0).to(x.dtype).reshape(x.shape))

    found = graph.lower(exported, hlo.device(), Collectives(all_reduce, all_gather, broadcast), REPLACEMENTS)
    # Made anew as a plain module: an exported one refuses eval(), and what is not a parameter would not be moved.
    ready: Any = GraphModule(exported, exported.graph)
    ready.register_buffer("_tpray_rank", torch.tensor([rank]))  # not a number: the ranks' programs are the same
    return ready, found


def _without(module: Any, kept: set[int], outputs: int) -> Module:
    """The module without those outputs that are its states' next values, whether it returns them or not.

    Upstream has done both; torch-neuronx's documentation does not say which.
    """

    def run(*inputs: Tensor) -> list[Tensor]:
        made = module(*inputs)
        returned = [made] if isinstance(made, Tensor) else list(made)
        numbers = range(outputs) if len(returned) == outputs else sorted(set(range(outputs)) - kept)
        by_number = dict(zip(numbers, returned, strict=True))
        return [by_number[number] for number in range(outputs) if number not in kept]

    return run


class _Together:
    """The ranks of one process that load an artifact, each in its thread: what they do in turn, and where they meet.

    A rank that fails takes the others with it, and all raise what it raised.
    """

    _loading: dict[Path, _Together] = {}  # noqa: RUF012  # of this process
    _lock = threading.Lock()

    def __init__(self, ranks: int) -> None:
        self._turn, self._barrier, self._arrived = threading.Lock(), threading.Barrier(ranks), 0
        self._error: BaseException | None = None

    @classmethod
    def of(cls, artifact: Path, ranks: int) -> _Together:
        """That of all ranks that load ``artifact`` now; the last one to ask takes it out of the list."""
        with cls._lock:
            own = cls._loading.setdefault(artifact, cls(ranks))
            own._arrived += 1
            if own._arrived == ranks:
                del cls._loading[artifact]
            return own

    @contextmanager
    def at_once(self) -> Iterator[None]:
        try:
            yield
        except BaseException as e:
            self._error = e
            self._barrier.abort()
            raise

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        with self._turn, self.at_once():
            yield

    def wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            assert self._error is not None, "only a rank that fails breaks it"
            raise self._error from None


def _keep_log(path: Path) -> Path | None:
    """Move a compiler's log out of what is about to be removed."""
    if not path.is_file():
        return None
    kept = compiler_cache() / f"failed-{path.parent.name}-{os.getpid()}.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, kept)
    return kept
