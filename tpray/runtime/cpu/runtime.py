"""CPU cores: the shard is traced with ``torch.export`` and run by torch.

Batch and sequence stay symbolic, so that one program serves every shape without padding to buckets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpray.platforms.topology import Topology
from tpray.runtime.base import Program, Report, SavedShard, SavedUserModel, no_report
from tpray.runtime.buckets import Bucket
from tpray.runtime.cpu import passes
from tpray.runtime.cpu.int8 import mark_int8, quantise_linears
from tpray.runtime.cpu.packing import PackedRows, pack_rows, plain_copy, run_packed
from tpray.runtime.exported import as_module, export, inputs_of, load_programs, record_program, save_programs
from tpray.runtime.records import ProgramRecord
from tpray.runtime.shaped import ShapedProgram

log = logging.getLogger(__name__)


def lower(module: GraphModule, rank: int, in_int8: Callable[[str], bool] | None = None) -> dict[str, int]:
    """Run every pass in its order; how many matches each found. in_int8: which layers, by their paths, to quantise."""
    steps: dict[str, Callable[[], int]] = {
        "no-ops removed": lambda: passes.remove_no_ops(module),
        "linears chosen for int8": lambda: 0 if in_int8 is None else mark_int8(module, in_int8),
        "sibling linears merged": lambda: passes.merge_sibling_linears(module),
        "additions moved before all-reduces": lambda: passes.add_before_reducing(module, rank),
        "linears quantised": lambda: quantise_linears(module),
        "linears prepacked": lambda: passes.prepack_linears(module),
        "activations fused": lambda: passes.fuse_activations(module),
        "residuals fused": lambda: passes.fuse_residuals(module),
        "masks converted": lambda: passes.convert_masks(module),
    }
    return {name: step() for name, step in steps.items()}


class CpuProgram:
    """A lowered program in two versions that share their weights: packed rows, and padded ones as the fallback."""

    def __init__(self, module: GraphModule) -> None:
        self.packed = pack_rows(module)
        self.packs_rows = self.packed is not None
        # Made anew, so that the tensors that lowering has replaced are let go.
        self.padded = GraphModule(module, plain_copy(module))

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Logits ``[B, L]`` for ids, mask and types int64 ``[B, S]``."""
        rows = None if self.packed is None else PackedRows.of(inputs[1])
        if self.packed is None or rows is None:
            return (self.padded(*inputs),)
        return (run_packed(self.packed, rows, inputs),)


class CpuRuntime:
    """See `tpray.runtime.base.Runtime`."""

    attention = "sdpa"

    def __init__(self, topology: Topology, first_core: int | None = None) -> None:
        """Neither matters here: the threads of a rank are set by its worker."""

    def join(self, rank: int, size: int) -> None:
        """The group's `Collective` is all there is."""

    def trace(
        self, shard: nn.Module, max_length: int, directory: Path, buckets: Sequence[Bucket], report: Report = no_report
    ) -> None:
        if buckets:
            self.trace_user_model(shard, list(map(inputs_of, buckets)), directory)
            return
        batch, sequence = (
            torch.export.Dim("batch", min=1),
            torch.export.Dim("sequence", min=1, max=max_length),
        )
        # Sizes of 0 and 1 would be taken for constants, whatever the Dim says.
        ids = torch.full((2, min(16, max_length)), 2, dtype=torch.int64)
        example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
        with torch.no_grad():
            program = torch.export.export(
                shard, example, dynamic_shapes=({0: batch, 1: sequence},) * len(example), strict=False
            )
        save_programs([program], directory)

    def load(self, saved: SavedShard) -> Program:
        modules = [as_module(p) for p in load_programs(saved.directory, len(saved.buckets) or 1)]
        in_int8 = saved.plan.is_sharded if saved.dtype == "int8" else None
        for module in modules:
            found = lower(module, saved.rank, in_int8)
            log.info("rank %d lowered: %s", saved.rank, ", ".join(f"{n} {name}" for name, n in found.items()))
        if not saved.buckets:
            return CpuProgram(modules[0])
        return ShapedProgram.of_buckets(saved.buckets, [GraphModule(m, plain_copy(m)) for m in modules])

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
        save_programs(programs, directory)
        return [record_program(program, example) for program, example in zip(programs, examples, strict=True)]

    def load_user_model(self, saved: SavedUserModel) -> Program:
        loaded = load_programs(saved.directory, len(saved.programs))
        state = dict(loaded[0].state_dict)
        modules = [as_module(program) for program in loaded]
        for module in modules:
            lower(module, saved.rank)
        return ShapedProgram.of_records(saved.programs, modules, {state[name]: i for name, i in saved.aliases.items()})
