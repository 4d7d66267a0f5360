"""CPU cores: the shard is traced with ``torch.export`` and run by torch.

Batch and sequence stay symbolic, so that one program serves every shape without padding to buckets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from tpray.parallel_layers import parallel_state
from tpray.platforms.topology import Topology
from tpray.runtime.base import Program, Report, SavedShard, SavedUserModel, no_report
from tpray.runtime.buckets import Bucket
from tpray.runtime.cpu import fusions, passes
from tpray.runtime.cpu.bands import plain_copy
from tpray.runtime.cpu.int8 import mark_int8, quantise_linears
from tpray.runtime.cpu.lowered import Function, LoadedGraph, graph_file, load_graphs, save_graphs
from tpray.runtime.cpu.packing import pack_rows
from tpray.runtime.cpu.rows import PackedRows
from tpray.runtime.exported import as_module, export, inputs_of, record_program
from tpray.runtime.records import ProgramRecord
from tpray.runtime.shaped import ShapedProgram

log = logging.getLogger(__name__)


def lower(module: GraphModule, rank: int, in_int8: Callable[[str], bool] | None = None) -> dict[str, int]:
    """Run every pass in its order; how many matches each found.

    Args:
        in_int8: which layers, by their paths, to quantise.
    """
    steps: dict[str, Callable[[], int]] = {
        "no-ops removed": lambda: passes.remove_no_ops(module),
        "RMS norms fused": lambda: fusions.fuse_rms_norms(module),
        "rotations fused": lambda: fusions.fuse_rotations(module),
        "GELUs named": lambda: fusions.name_gelus(module),
        "attentions named": lambda: fusions.name_attentions(module),
        "linears chosen for int8": lambda: 0 if in_int8 is None else mark_int8(module, in_int8),
        "sibling linears merged": lambda: passes.merge_sibling_linears(module),
        "additions moved before all-reduces": lambda: passes.add_before_reducing(module, rank),
        "biases folded": lambda: passes.fold_biases(module),
        "linears quantised": lambda: quantise_linears(module),
        "linears given to oneDNN": lambda: passes.use_onednn(module),
        "activations fused": lambda: passes.fuse_activations(module),
        "residuals fused": lambda: passes.fuse_residuals(module),
        "masks converted": lambda: passes.convert_masks(module),
    }
    return {name: step() for name, step in steps.items()}


class CpuProgram:
    """A lowered program in two versions that share their weights: padded rows, and packed ones where it has that."""

    def __init__(self, padded: LoadedGraph, packed: LoadedGraph | None = None) -> None:
        self.padded, self.packed = padded, packed
        self.packs_rows = packed is not None
        self.parts = padded.parts if packed is None or packed.parts == padded.parts else 1

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Logits ``[B, L]``, or ``[B, S, L]``, for ids, mask and types int64 ``[B, S]``."""
        graph, arguments = self._prepared(inputs)
        outputs: Sequence[Tensor] = graph.run(*arguments)
        return outputs

    def in_parts(self, *inputs: Tensor) -> Generator[None, None, Sequence[Tensor]]:
        """The same, with stops on the way."""
        graph, arguments = self._prepared(inputs)
        return graph.in_parts(*arguments)

    def _prepared(self, inputs: Sequence[Tensor]) -> tuple[LoadedGraph, Sequence[Any]]:
        """Which graph takes ``inputs``, and as what."""
        rows = None if self.packed is None else PackedRows.of(inputs[1])
        if self.packed is None or rows is None:
            return self.padded, inputs
        ids, mask, types = inputs
        return self.packed, (rows.pack(ids), mask, rows.pack(types), rows)


class CpuRuntime:
    """See `tpray.runtime.base.Runtime`."""

    attention = "sdpa"

    def __init__(self, topology: Topology, first_core: int | None = None) -> None:
        """Neither matters here: the threads of a rank are set by its worker."""

    def join(self, rank: int, size: int) -> None:
        """The group's `Collective` is all there is."""

    def trace(
        self,
        shard: nn.Module,
        max_length: int,
        directory: Path,
        buckets: Sequence[Bucket],
        report: Report = no_report,
        in_int8: Callable[[str], bool] | None = None,
    ) -> None:
        if buckets:
            programs = export(shard, list(map(inputs_of, buckets)))
            save_graphs([_lowered(program, in_int8) for program in programs], directory)
            return
        batch, sequence = (
            torch.export.Dim("batch", min=1),
            torch.export.Dim("sequence", min=1, max=max_length),
        )
        # Sizes of 0 and 1 would be taken for constants, whatever the Dim says.
        ids = torch.full((2, min(16, max_length)), 2, dtype=torch.int64)
        example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
        shapes = ({0: batch, 1: sequence},) * len(example)
        try:
            program = _export(shard, example, shapes)
        except torch._dynamo.exc.UserError:  # a part of the row could be of one token, which would be a constant too
            with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # added late
                program = _export(shard, example, shapes)
        module, padded = _lowered(program, in_int8)
        packed = pack_rows(module, max_length)
        save_graphs([(module, padded), *([] if packed is None else [(module, packed)])], directory)

    def load(self, saved: SavedShard) -> Program:
        if saved.buckets:
            return ShapedProgram.of_buckets(saved.buckets, _functions(saved.directory, len(saved.buckets))[0])
        packs_rows = (saved.directory / graph_file(1)).exists()
        program = CpuProgram(*load_graphs(saved.directory, 1 + packs_rows)[0])
        kinds = "padded rows, and packed ones" if packs_rows else "padded rows"
        log.info("rank %d loaded a program of %s, in up to %d parts", saved.rank, kinds, program.parts)
        return program

    def trace_user_model(
        self,
        module: nn.Module,
        examples: Sequence[tuple[Tensor, ...]],
        directory: Path,
        compiler_args: tuple[str, ...] = (),
        aliases: Mapping[str, int] | None = None,
    ) -> list[ProgramRecord]:
        """Nothing is compiled for CPU cores, so that there is nothing that ``compiler_args`` could change.

        ``aliases`` are applied after each step, by the program that `load_user_model` makes.
        """
        programs = export(module, examples)
        modules = [as_module(program) for program in programs]  # as they are: the passes know classifiers
        save_graphs([(module, plain_copy(module)) for module in modules], directory, aliases or ())
        return [record_program(program, example) for program, example in zip(programs, examples, strict=True)]

    def load_user_model(self, saved: SavedUserModel) -> Program:
        programs, tensor = _functions(saved.directory, len(saved.programs))
        return ShapedProgram.of_records(
            saved.programs, programs, {tensor(name): i for name, i in saved.aliases.items()}
        )


def _export(shard: nn.Module, example: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(shard, example, dynamic_shapes=shapes, strict=False)


def _functions(directory: Path, count: int) -> tuple[list[Function], Callable[[str], Tensor]]:
    """`load_graphs` of graphs that are always run as a whole."""
    graphs, tensor = load_graphs(directory, count)
    return [graph.run for graph in graphs], tensor


def _lowered(program: ExportedProgram, in_int8: Callable[[str], bool] | None = None) -> tuple[GraphModule, Graph]:
    """A program lowered for this rank: the module that holds its tensors, and the graph to store."""
    module = as_module(program)
    rank = parallel_state.get_tensor_model_parallel_rank()
    found = lower(module, rank, in_int8)
    log.info("rank %d lowered: %s", rank, ", ".join(f"{n} {name}" for name, n in found.items()))
    return module, plain_copy(module)
