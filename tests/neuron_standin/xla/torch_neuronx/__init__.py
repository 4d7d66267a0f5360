"""A stand-in for torch-neuronx 2.9: trace, loading with collectives, and execution on a core.

It computes on the CPU and checks what the real one does; each rule names its source. ``neuron_rules`` has the rules of
the runtime below it.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neuron_rules
import torch
import torch_xla.distributed.xla_backend as xla
from neuron_rules import NrtError, ThreadExchange, compile_log, same_call
from torch import Tensor, nn

from . import contexts

__version__ = "2.9.0.2.15.32035"

_loaded: dict[str, tuple[int, int, int]] = {}  # a program -> its core, rank and world
_moved: set[str] = set()
_now = threading.local()  # the program that this thread runs

_library = torch.library.Library("neuron_standin", "DEF")
_library.define("enter(Tensor x, Tensor neff) -> Tensor")
_library.define("all_reduce(Tensor x, int world) -> Tensor")
_library.define("all_gather(Tensor x, int dim, int world) -> Tensor")


def _gather(x: Tensor, name: str, world: int) -> list[Tensor]:
    _core, rank, own_world = _loaded[_now.neff]
    if world != own_world:
        raise NrtError(f"the program has collectives over {world} ranks, and was loaded for {own_world}")
    if xla.exchange is not None:
        gather: Any = xla.exchange.gather
    else:
        threads = ThreadExchange.of(world)
        gather = lambda part: threads.gather(part, rank)  # noqa: E731
    same_call(gather, name, x)
    parts: list[Tensor] = gather(x)
    return parts


def _enter(x: Tensor, neff: Tensor) -> Tensor:
    if getattr(_now, "tracing", False):
        return x.clone()
    key = bytes(neff.tolist()).decode()
    # Rule: a program with collectives runs only where _load_collectives_neuron has put it (nxd's trace module).
    if key not in _loaded:
        raise NrtError("nrt_execute: the model was not loaded with its collectives")
    if key not in _moved:
        raise NrtError("nrt_execute: the model's weights are not on the device: call move_trace_to_device")
    _now.neff = key
    return x.clone()


def _all_reduce(x: Tensor, world: int) -> Tensor:
    return x.clone() if getattr(_now, "tracing", False) else torch.stack(_gather(x, "all_reduce", world)).sum(0)


def _all_gather(x: Tensor, dim: int, world: int) -> Tensor:
    return torch.cat([x] * world if getattr(_now, "tracing", False) else _gather(x, "all_gather", world), dim)


_library.impl("enter", _enter, "CPU")
_library.impl("all_reduce", _all_reduce, "CPU")
_library.impl("all_gather", _all_gather, "CPU")


class _Neff(nn.Module):
    def __init__(self, function: nn.Module, key: str) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("neff", torch.tensor(list(key.encode()), dtype=torch.uint8))

    def forward(self, *inputs: Tensor) -> Any:
        first = torch.ops.neuron_standin.enter(inputs[0], self.neff)
        return self.function(first, *inputs[1:])


class _Traced(nn.Module):
    """Rule: the loader takes the traced module's ``model`` (nxd's trace module)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


def trace(
    func: Any,
    example_inputs: Any,
    *_: Any,
    input_output_aliases: dict[Any, int] | None = None,
    compiler_workdir: str | None = None,
    compiler_args: list[str] | str | None = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
) -> Any:
    """Source of the signature: torch_neuronx.trace's API reference."""
    if not isinstance(example_inputs, tuple) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise TypeError("example_inputs is a tuple of tensors")
    if isinstance(func, nn.Module) and func.training:
        raise RuntimeError("a module is traced in eval mode")
    # Rule: the compiler's arguments are flags; it names the ones it does not know (neuronx-cc's CLI reference).
    for argument in compiler_args or []:
        if argument.split("=")[0] not in ("--model-type", "--auto-cast", "--target", "--lnc", "--optlevel"):
            raise RuntimeError(f"neuronx-cc: unknown argument {argument}")
    lnc = neuron_rules.ENV.get("NEURON_LOGICAL_NC_CONFIG")
    # Rule: NEURON_LOGICAL_NC_CONFIG must match the compiler's --lnc (Neuron's LNC guide).
    if lnc is not None and f"--lnc={lnc}" not in (compiler_args or []):
        raise RuntimeError(f"NEURON_LOGICAL_NC_CONFIG is {lnc}, and the program is compiled for {compiler_args}")
    key = uuid.uuid4().hex
    compile_log(Path(compiler_workdir or os.environ["NEURON_STANDIN_DIR"]), key)
    _now.tracing = True
    try:
        with torch.no_grad():
            return torch.jit.trace(_Traced(_Neff(func, key)), example_inputs, strict=False, check_trace=False)
    finally:
        _now.tracing = False


def _load_collectives(model: Any, start_core: int, count: int, rank: int, world: int) -> None:
    """torch.ops.neuron._load_collectives_neuron. Source of the signature: nxd's trace module."""
    if not hasattr(model, "neff"):
        raise TypeError("the loader takes the traced module's .model")
    cores = neuron_rules.visible_cores()
    # Rule: cores are counted within the process (NEURON_RT_VISIBLE_CORES, runtime configuration guide).
    if count != 1 or not 0 <= start_core < len(cores) or not 0 <= rank < world:
        raise NrtError(f"core {start_core} of {len(cores)}, {count} cores, rank {rank} of {world}")
    neuron_rules.nrt_init(rank, world)
    neuron_rules.fail_process_per_rank(world)
    _loaded[bytes(model.neff.tolist()).decode()] = (start_core, rank, world)
    # Rule: collective ranks load together (nxd loads in one thread a rank).
    if world > 1:
        everyone = torch.tensor([rank])
        ranks = xla.exchange.gather(everyone) if xla.exchange else ThreadExchange.of(world).gather(everyone, rank)
        if sorted(int(r) for r in ranks) != list(range(world)):
            raise NrtError(f"ranks {ranks} loaded together")


torch.ops.neuron._load_collectives_neuron = _load_collectives  # type: ignore[attr-defined]  # a namespace takes any name


def move_trace_to_device(trace: Any, device_id: int) -> None:
    """Source: torch_neuronx's placement API."""
    key = bytes(trace.model.neff.tolist()).decode()
    if key not in _loaded or _loaded[key][0] != device_id:
        raise NrtError(f"the model is not on core {device_id}")
    _moved.add(key)


_jit_load: Callable[..., Any] = torch.jit.load


def _load(*args: Any, **kwargs: Any) -> Any:
    # Rule: outside of disable_nrt_load the module would go to a core by itself, without its collectives.
    if not contexts.disabled():
        raise NrtError("nrt_load: no collectives communicator; load under torch_neuronx.contexts.disable_nrt_load()")
    return _jit_load(*args, **kwargs)


torch.jit.load = _load
