"""What both Neuron runtimes do to a program before they compile it.

A shard is exported once for each bucket, as on the CPU, with the collectives as single operators. Here these become
calls that Neuron's compilers know, and the device that the exporter wrote into the graph becomes the real one.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from tpray.errors import CompileError

log = logging.getLogger(__name__)

_KEPT = (torch.ops.aten._assert_tensor_metadata.default,)


@dataclass(frozen=True)
class Collectives:
    """How a backend spells them: functions of a tensor, the dimension and size, and the source rank."""

    all_reduce: Callable[[Tensor], Tensor]
    all_gather: Callable[[Tensor, int, int], Tensor]
    broadcast: Callable[[Tensor, int], Tensor]


def lower(
    module: GraphModule,
    device: Any,
    collectives: Collectives,
    functions: Mapping[Any, Callable[..., Tensor]] | None = None,
) -> int:
    """Rewrite in place for ``device``; how many collectives were found.

    functions: what takes the place of operators that the device's compiler does not know.
    """
    ops = torch.ops.tpray
    of_collectives: dict[Any, Callable[..., Tensor]] = {
        ops.all_reduce.default: collectives.all_reduce,
        ops.all_gather.default: collectives.all_gather,
        ops.broadcast.default: collectives.broadcast,
    }
    fold_constants(module)
    for part in module.modules():
        part.training = False  # eval() is refused on exported modules: this was settled when they were traced
    replacements = of_collectives | dict(functions or {})
    found = 0
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # of the exporter's device
            module.graph.erase_node(node)
            continue
        if node.op == "call_function" and node.target in replacements:
            found += node.target in of_collectives
            node.target = replacements[node.target]
        # Of a tensor that the program makes, positions or a mask, or that it converts.
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
    module.graph.lint()
    module.recompile()
    return found


def program_for(example: Sequence[Tensor]) -> str:
    """What a program is called in reports and errors: by the shapes that it takes."""
    return f"the program for {', '.join(str(list(x.shape)) for x in example)}"


def fold_constants(module: GraphModule) -> int:
    """Compute in place, once and for all, what depends on no input and no weight: positions, mostly; how many."""
    known: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and all(i in known for i in node.all_input_nodes) and node.target not in _KEPT:
            arguments = map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
            known[node] = node.target(*arguments[0], **arguments[1])
    needed = [n for n in known if isinstance(known[n], Tensor) and any(user not in known for user in n.users)]
    for number, node in enumerate(needed):
        name = f"_tpray_constant_{number}"
        module.register_buffer(name, known[node])
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name), delete_user_cb=lambda user: user not in known)
    module.graph.eliminate_dead_code()
    return len(needed)


def compile_error(rank: int, what: str, error: Exception, log: Path | None, lines: int = 12) -> CompileError:
    """A compiler's failure with the end of what it wrote, and where all of it is."""
    if log is not None and log.is_file():
        said = log.read_text(errors="replace").strip().splitlines()[-lines:]
        rest = f" its log, {log}, ends with"
    else:
        said = str(getattr(error, "inner_exception", error)).strip().splitlines()[:lines]
        rest = f" {type(error).__name__}"
    shown = "\n".join(f"  {line}" for line in said)
    return CompileError(f"rank {rank}: {what} was not compiled:{rest}\n{shown}")


LOCK_GRACE_S = 60.0


def remove_stale_locks(cache: Path) -> list[Path]:
    """Remove the lock files in a compiler's cache that nobody can hold; a compiler that was killed left them.

    The next compiler would wait for such a file without end. Whether a compiler locks its file (flock) or only makes
    it, its publisher does not say: a file stays if it is locked, or new, or made since the oldest compiler that runs.
    """
    removed = []
    oldest = _oldest_compiler()
    for path in sorted(cache.rglob("*.lock")):
        try:
            made = path.stat().st_mtime
            if time.time() - made < LOCK_GRACE_S or made >= oldest:
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # it is locked, or another's; or another rank, which looks at the same time, has removed it
            continue
        removed.append(path)
        log.warning("removed %s, which a compiler that was killed had left", path)
    return removed


def _oldest_compiler() -> float:
    """Since when the oldest compiler of this machine runs; infinity if none does. Source: proc(5), starttime."""
    booted, ticks = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK")
    since = [float("inf")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"neuronx-cc" in (process / "cmdline").read_bytes():
                after_name = (process / "stat").read_text().rpartition(")")[2].split()
                since.append(booted + int(after_name[19]) / ticks)
        except OSError:  # it has ended meanwhile
            continue
    return min(since)
