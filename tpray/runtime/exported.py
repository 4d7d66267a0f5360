"""A traced program on disk: a graph as JSON and its tensors as safetensors. Nothing is pickled.

``torch.export.save`` would do, but ``torch.export.load`` unpickles some tensors and opaque constants, and a
graph may carry guards that are Python source. Here only the JSON half of torch's own serialiser is used,
guards are dropped, and the operators that a graph may name are limited to those of `ALLOWED`.

Source: torch/_export/serde of torch 2.13. It is private, which is one reason why torch is pinned exactly.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tpray.errors import ArtifactError, ConfigError
from tpray.runtime.buckets import Bucket
from tpray.runtime.records import ProgramRecord
from tpray.runtime.user_model import record_of

SERIALISER = "2.13"
"""The release of torch whose serialiser this is."""

WEIGHTS_FILE = "weights.safetensors"

ALLOWED = ("aten", "tpray")
"""Namespaces whose operators a stored graph may call: arithmetic, and this package's collectives."""
REFUSED = ("aten.from_file.",)
"""Operators that it may not call for all that: this one opens any file."""

ARITHMETIC: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in {
        operator: "add and_ eq floordiv ge getitem gt le lt mod mul ne neg not_ or_ pow sub truediv",
        math: "ceil floor sqrt trunc",
        torch: "sym_float sym_int sym_max sym_min sym_not sym_sqrt sym_sum",
    }.items()
    for name in names.split()
    if hasattr(module, name)
}
"""Arithmetic of sizes. Not all of ``operator``: some of it calls whatever it is given the name of."""


def inputs_of(bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
    """Example ids, mask and types int64 ``[B, S]``."""
    ids = torch.full(bucket, 2, dtype=torch.int64)
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def export(module: nn.Module, examples: Sequence[tuple[Tensor, ...]]) -> list[ExportedProgram]:
    """One program of static shapes for each of ``examples``."""
    with torch.no_grad():
        return [torch.export.export(module, example, strict=False) for example in examples]


def record_program(program: ExportedProgram, example: tuple[Tensor, ...]) -> ProgramRecord:
    """What goes in and what comes back to the caller, as the trace recorded it; not the buffers that it changes."""
    nodes = {node.name: node for node in program.graph.nodes}
    outputs = [nodes[name].meta["val"] for name in program.graph_signature.user_outputs if isinstance(name, str)]
    return ProgramRecord(inputs=tuple(map(record_of, example)), outputs=tuple(map(record_of, outputs)))


def graph_file(number: int) -> str:
    """What the file of program ``number``, from 0, is called."""
    return f"program_{number}.json"


def save_programs(programs: Sequence[ExportedProgram], directory: Path) -> None:
    """Write programs of one module, traced for different shapes; its tensors are stored once.

    Raises:
        ConfigError: this is not the torch whose serialiser is used.
    """
    if not torch.__version__.startswith(f"{SERIALISER}."):
        raise ConfigError(f"this runtime needs torch {SERIALISER}, and this is {torch.__version__}: install that one")
    from torch._export.serde import serialize as serde

    tensors: dict[str, Tensor] = {}
    for number, program in enumerate(programs):
        program._guards_code = []
        parts = serde.ExportedProgramSerializer().serialize(
            program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
        )
        (directory / graph_file(number)).write_bytes(serde._to_json_bytes(parts.exported_program))
        tensors |= {f"state/{name}": value for name, value in program.state_dict.items()}
        constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
        tensors |= {f"constant_{number}/{name}": value for name, value in constants.items()}
    # safetensors refuses tensors that share memory, as an expanded buffer does with itself
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, directory / WEIGHTS_FILE)


def load_programs(directory: Path, count: int = 1) -> list[ExportedProgram]:
    """Read what `save_programs` wrote; the programs share their state, and its pages are memory-mapped.

    Raises:
        ArtifactError: the files are damaged, or a graph names an operator that is not `ALLOWED`.
    """
    from torch._export.serde import schema
    from torch._export.serde import serialize as serde

    weights = directory / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as e:
        raise ArtifactError(f"{weights} cannot be read: {e}") from e
    state = {name: torch.nn.Parameter(t, requires_grad=False) for name, t in _under("state/", tensors).items()}
    programs = []
    for number in range(count):
        path = directory / graph_file(number)
        try:
            stored = json.loads(path.read_bytes())
            _check_operators(stored, path)
            stored["guards_code"] = []
            graph = serde._dict_to_dataclass(schema.ExportedProgram, stored)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise ArtifactError(f"{path} is not a traced program of this version: {e}") from e
        constants = _under(f"constant_{number}/", tensors)
        programs.append(
            serde.ExportedProgramDeserializer().deserialize(graph, dict(state), constants, example_inputs=None)
        )
    return programs


def as_module(program: ExportedProgram) -> GraphModule:
    """The program as a graph to run or to rewrite, without per-call checks of its inputs' shapes."""
    module: GraphModule = program.module(check_guards=False)
    # eval() is refused on exported modules: training or not was settled when they were traced.
    return module


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check_operators(stored: dict[str, object], path: Path) -> None:
    """Raise `ArtifactError` if any node of the stored graph calls something outside `ALLOWED`."""

    def targets(part: object) -> set[str]:
        if isinstance(part, dict):
            own = {part["target"]} if isinstance(part.get("target"), str) and "inputs" in part else set()
            return own.union(*map(targets, part.values()))
        return set().union(*map(targets, part)) if isinstance(part, list) else set()

    for target in targets(stored["graph_module"]):
        name = target.removeprefix("torch.ops.").replace("_operator.", "operator.", 1)
        known = name in ARITHMETIC or name.split(".")[0] in ALLOWED
        if not known or name.startswith(REFUSED):
            raise ArtifactError(f"{path} calls {target}, which no program that tpray traces does; refused")
