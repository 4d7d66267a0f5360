"""CPU cores: the shard is traced with ``torch.export`` and run by torch.

Batch and sequence stay symbolic, so that one program serves every shape without padding to buckets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpray.config import DtypeName, RuntimeName
from tpray.errors import ConfigError
from tpray.runtime import passes
from tpray.runtime.artifact import Artifact, FunctionArtifact, ProgramRecord
from tpray.runtime.base import Program, Tell, silent
from tpray.runtime.buckets import Bucket
from tpray.runtime.function import FunctionProgram
from tpray.runtime.int8 import mark_int8, quantise_linears
from tpray.runtime.packing import Rows, pack_rows, plain_copy, run_packed
from tpray.runtime.program import as_module, export, inputs_of, load_programs, record_program, save_programs

log = logging.getLogger("tpray.runtime.cpu")


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction set extensions of this machine's cores, as Linux names them in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(named.partition(":")[2].split())


def multiplies_bfloat16() -> bool:
    """Whether the cores multiply bfloat16 themselves (AVX512_BF16 or AMX), rather than by way of float32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def multiplies_int8() -> bool:
    """Whether the cores multiply 8-bit integers four at a time (VNNI or AMX)."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def lower(module: GraphModule, rank: int, in_int8: Callable[[str], bool] | None = None) -> dict[str, int]:
    """Run every pass in its order; how many matches each found. in_int8: which layers, by their paths, to quantise."""
    steps: dict[str, Callable[[], int]] = {
        "no-ops removed": lambda: passes.remove_no_ops(module),
        "linears chosen for int8": lambda: 0 if in_int8 is None else mark_int8(module, in_int8),
        "sibling linears merged": lambda: passes.merge_sibling_linears(module),
        "additions moved before all-reduces": lambda: passes.add_before_reducing(module, rank),
        "linears quantised": lambda: quantise_linears(module),
        "linears packed": lambda: passes.pack_linears(module),
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
        rows = None if self.packed is None else Rows.of(inputs[1])
        if self.packed is None or rows is None:
            return (self.padded(*inputs),)
        return (run_packed(self.packed, rows, inputs),)


class BucketProgram:
    """One lowered program for each bucket; each has weights that are packed for it."""

    packs_rows = False

    def __init__(self, modules: Mapping[Bucket, GraphModule]) -> None:
        self._modules = {bucket: GraphModule(module, plain_copy(module)) for bucket, module in modules.items()}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Logits ``[B, L]`` for ids, mask and types int64 ``[B, S]`` of a bucket's shape."""
        batch, length = inputs[0].shape
        return (self._modules[Bucket(batch, length)](*inputs),)


class CpuRuntime:
    """See `tpray.runtime.base.Runtime`."""

    name: RuntimeName = "cpu"
    attention = "sdpa"
    compiles_alone = True

    def default_buckets(self, max_length: int) -> tuple[Bucket, ...]:
        return ()

    def join(self, rank: int, size: int) -> None:
        """The group's `Collective` is all there is."""

    def choose_dtype(self, asked: DtypeName) -> str:
        """``auto`` is bfloat16 where the cores multiply it natively, else float32."""
        able = [name for name, can in (("int8", multiplies_int8()), ("bfloat16", multiplies_bfloat16())) if can]
        if asked not in ("auto", "float32", *able):
            lacks = {"int8": "no AVX512_VNNI, AVX_VNNI or AMX", "bfloat16": "no AVX512_BF16 or AMX"}[asked]
            raise ConfigError(
                f"this CPU does not multiply {asked} itself ({lacks}), which makes it slower than float32: use "
                f"--dtype {', '.join([*able, 'float32'])} or auto"
            )
        if asked == "auto":
            return "bfloat16" if multiplies_bfloat16() else "float32"
        return asked

    def trace(
        self, shard: nn.Module, max_length: int, directory: Path, buckets: Sequence[Bucket] = (), tell: Tell = silent
    ) -> None:
        if buckets:
            self.trace_function(shard, list(map(inputs_of, buckets)), directory)
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

    def load(self, artifact: Artifact, rank: int) -> Program:
        buckets = artifact.manifest.buckets
        modules = [as_module(p) for p in load_programs(artifact.rank_directory(rank), len(buckets) or 1)]
        in_int8 = artifact.manifest.model.sharding.is_sharded if artifact.manifest.dtype == "int8" else None
        for module in modules:
            found = lower(module, rank, in_int8)
            log.info("rank %d lowered: %s", rank, ", ".join(f"{n} {name}" for name, n in found.items()))
        return BucketProgram(dict(zip(buckets, modules, strict=True))) if buckets else CpuProgram(modules[0])

    def trace_function(
        self, module: nn.Module, examples: Sequence[tuple[Tensor, ...]], directory: Path
    ) -> list[ProgramRecord]:
        programs = export(module, examples)
        save_programs(programs, directory)
        return [record_program(program, example) for program, example in zip(programs, examples, strict=True)]

    def load_function(self, artifact: FunctionArtifact, rank: int) -> FunctionProgram:
        records = artifact.manifest.programs
        loaded = load_programs(artifact.rank_directory(rank), len(records))
        state = dict(loaded[0].state_dict)
        modules = [as_module(program) for program in loaded]
        for module in modules:
            lower(module, rank)
        return FunctionProgram(modules, records, {state[name]: i for name, i in artifact.manifest.aliases.items()})

    def warm_up_shapes(self, max_length: int) -> Sequence[tuple[int, int]]:
        """oneDNN compiles a kernel per shape on first use; these cover the common ones."""
        lengths = [length for length in (16, 32, 64, 128) if length <= max_length] or [max_length]
        return [(batch, length) for length in lengths for batch in (1, 8)]
