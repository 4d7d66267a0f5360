"""What both Neuron runtimes do to a program before they compile it.

A shard is exported once for each bucket, as on the CPU, with the collectives as single operators. Here these become
calls that Neuron's compilers know, and the device that the exporter wrote into the graph becomes the real one.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tpray.config import DtypeName
from tpray.errors import CompileError, ConfigError
from tpray.runtime.buckets import Bucket

DEFAULT_BUCKETS = ((1, 128), (8, 128))
"""[B, S] that are traced when nobody says which: each takes minutes to compile."""


@dataclass(frozen=True)
class Collectives:
    """How a backend spells them: functions of a tensor, the dimension and size, and the source rank."""

    all_reduce: Callable[[Tensor], Tensor]
    all_gather: Callable[[Tensor, int, int], Tensor]
    broadcast: Callable[[Tensor, int], Tensor]


def choose_dtype(asked: DtypeName) -> str:
    """``auto`` is bfloat16, what NeuronCores multiply fastest.

    Raises:
        ConfigError: int8 is for CPUs.
    """
    if asked == "int8":
        raise ConfigError("NeuronCores are traced in bfloat16 or float32, not int8: use --dtype auto")
    return "bfloat16" if asked == "auto" else asked


def default_buckets(max_length: int) -> tuple[Bucket, ...]:
    """`DEFAULT_BUCKETS`, no longer than ``max_length``."""
    return tuple(sorted({Bucket(batch, min(length, max_length)) for batch, length in DEFAULT_BUCKETS}))


def lower(module: GraphModule, device: Any, collectives: Collectives) -> int:
    """Rewrite in place for ``device``; how many collectives were found."""
    ops = torch.ops.tpray
    replacements: dict[Any, Callable[..., Tensor]] = {
        ops.all_reduce.default: collectives.all_reduce,
        ops.all_gather.default: collectives.all_gather,
        ops.broadcast.default: collectives.broadcast,
    }
    found = 0
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # of the exporter's device
            module.graph.erase_node(node)
            continue
        if node.op == "call_function" and node.target in replacements:
            node.target = replacements[node.target]
            found += 1
        if "device" in node.kwargs:  # of a tensor that the program makes: positions, a mask
            node.kwargs = {**node.kwargs, "device": device}
    module.graph.lint()
    module.recompile()
    return found


def compile_error(rank: int, what: str, error: Exception, log: Path | None, lines: int = 12) -> CompileError:
    """A compiler's failure with the end of what it wrote, and where all of it is."""
    text = log.read_text(errors="replace") if log is not None and log.is_file() else str(error)
    tail = "\n".join(f"  {line}" for line in text.strip().splitlines()[-lines:])
    rest = f"; its log is {log}" if log is not None and log.is_file() else ""
    return CompileError(f"rank {rank}: {what} was not compiled ({type(error).__name__}){rest}. It ends with\n{tail}")
