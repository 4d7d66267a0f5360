"""A stand-in for torch-neuronx 2.9 over the real torch-xla: what is traced is lowered, and what is loaded is executed.

`trace` has torch-xla lower the module; the HLO is what Neuron's compiler would get. A loaded program's HLO is run by
XLA's CPU backend, as many replicas as there are ranks, its collectives included: see `neuron_device`. What is imitated
(the compiler's refusals, who owns a core, how a program is bound to it) names its source at each rule.
"""

from __future__ import annotations

import pickle
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import neuron_rules
import torch
import torch_xla
from neuron_device import Program, as_numpy, as_tensor, device_of
from neuron_rules import NrtError
from torch import Tensor, nn

from . import contexts

__version__ = "2.9.0.2.15.32035"

_now = threading.local()  # the outputs that a call gives while its module is made into TorchScript
_loaded: dict[str, tuple[int, int]] = {}  # a program -> its rank and world

_library = torch.library.Library("neuron_standin", "DEF")
_library.define("forward(Tensor neff, Tensor key, Tensor[] inputs) -> Tensor[]")


def _forward(neff: Tensor, key: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    example: list[Tensor] | None = getattr(_now, "outputs", None)
    if example is not None:
        return [x.clone() for x in example]
    name = bytes(key.tolist()).decode()
    # Rule: a program with collectives runs only where _load_collectives_neuron has put it (nxd, trace/trace.py).
    if name not in _loaded:
        raise NrtError("nrt_execute: the model was not loaded with its collectives")
    rank, world = _loaded[name]
    return [as_tensor(x) for x in device_of(rank, world).run(rank, name, [as_numpy(x) for x in inputs])]


_library.impl("forward", _forward, "CPU")


class _Model(nn.Module):
    def __init__(self, program: Program, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        for name, data in (("neff", pickle.dumps(program)), ("key", uuid.uuid4().hex.encode())):
            self.register_buffer(name, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def forward(self, *inputs: Tensor) -> Any:
        made = torch.ops.neuron_standin.forward(self.neff, self.key, list(inputs))
        return made[0] if self.outputs == 1 else tuple(made[i] for i in range(self.outputs))


class _Traced(nn.Module):
    """Rule: the loader takes the traced module's ``model`` (nxd, trace/trace.py)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


def trace(
    func: Any,
    example_inputs: Any,
    *_: Any,
    input_output_aliases: Mapping[Tensor, int] | None = None,
    compiler_workdir: str | None = None,
    compiler_args: Sequence[str] | str | None = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> Any:
    """Source of the signature: torch_neuronx.trace's API reference (aws-neuron-sdk, api-torch-neuronx-trace.rst)."""
    arguments = compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or [])
    if not cpu_backend:
        raise NotImplementedError("this stand-in has no cores to trace on, only cpu_backend=True")
    # Rule: "This keyword needs to be used with compiler_args to set the --target flag" (the same page).
    if not any(a.startswith("--target") for a in arguments):
        raise RuntimeError("cpu_backend=True takes the family of the cores: compiler_args with --target")
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    states = _names(func, input_output_aliases or {})
    program, outputs = _lower(func, examples, states)
    _compile(program, arguments, Path(compiler_workdir or "."))
    _now.outputs = outputs
    try:
        with torch.no_grad():
            traced = _Traced(_Model(program, len(outputs)).eval())
            return torch.jit.trace(traced, examples, strict=False, check_trace=False)
    finally:
        _now.outputs = None


def _names(func: Any, aliases: Mapping[Tensor, int]) -> dict[str, int]:
    """Rule: aliases are the module's own state tensors and the outputs that become their next values (nxd's example
    of a key/value cache, ``input_output_aliases``)."""
    named = {id(tensor): name for name, tensor in [*func.named_parameters(), *func.named_buffers()]} if aliases else {}
    return {named[id(tensor)]: number for tensor, number in aliases.items()}


def _lower(func: Any, examples: tuple[Tensor, ...], states: dict[str, int]) -> tuple[Program, list[Tensor]]:
    device = torch.device("xla", 0)
    if isinstance(func, nn.Module):
        func = func.to(device)
    inputs = [x.to(device) for x in examples]
    with torch.no_grad():
        made = func(*inputs)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    context = torch_xla._XLAC.lowering.LoweringContext()
    context.build(outputs)
    held = dict(context.parameter_id_tensor_mapping())
    given = {context.tensor_parameter_id(x): number for number, x in enumerate(inputs)}
    own = dict(func.state_dict(keep_vars=True)) | dict(func.named_buffers()) if states else {}
    kept = {context.tensor_parameter_id(own[name]): number for name, number in states.items()}
    program = Program(
        hlo=context.hlo(),
        text=context.hlo_text(),
        parameters={i: as_numpy(x.cpu()) for i, x in held.items() if i not in given},
        inputs={i: number for i, number in given.items() if i in held},
        states=kept,
    )
    return program, [torch.zeros(x.shape, dtype=x.dtype) for x in outputs]


_FLAGS = (
    "--model-type",
    "--auto-cast",
    "--auto-cast-type",
    "--target",
    "--lnc",
    "--optlevel",
    "--logfile",
    "--verbose",
)


def _compile(program: Program, arguments: Sequence[str], folder: Path) -> None:
    """What neuronx-cc would say; sources: its CLI reference and its error codes (aws-neuron-sdk, compiler/)."""
    log = Path(next((a.split("=", 1)[1] for a in arguments if a.startswith("--logfile=")), "log-neuron-cc.txt"))
    said = [f"INFO: pass {i}" for i in range(40)]
    text = program.text
    unknown = [a for a in arguments if a.split("=")[0] not in _FLAGS and not re.fullmatch(r"-O\d", a)]
    lnc = neuron_rules.ENV.get("NEURON_LOGICAL_NC_CONFIG")
    complaints = {
        f"unknown argument {', '.join(unknown)}": bool(unknown),
        "[NCC_EARG001] the logical core is not the runtime's": lnc is not None and f"--lnc={lnc}" not in arguments,
        "[NCC_EVRF001] Unsupported operator: erf": 'opcode: "erf"' in text,  # aws-neuron-sdk 1081
        "[NCC_EMOD025] Dynamic shape is not supported": "is_dynamic_dimension: true" in text,
        "[NCC_EVRF004] Complex data types are not supported": "element_type: C64" in text,
        "[NCC_EVRF004] the operator frobnicate": bool(neuron_rules.os.environ.get("NEURON_STANDIN_FAIL_COMPILE")),
    }
    failed = [words for words, is_so in complaints.items() if is_so]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join([*said, *(f"ERROR: {words}" for words in failed)]))
    if failed:
        raise RuntimeError(f"neuronx-cc failed with 70: {failed[0]}")


def _load_collectives(model: Any, start_core: int, count: int, rank: int, world: int) -> None:
    """torch.ops.neuron._load_collectives_neuron. Source of the signature: nxd, trace/trace.py."""
    if not hasattr(model, "neff"):
        raise TypeError("the loader takes the traced module's .model")
    cores = neuron_rules.visible_cores()
    # Rule: cores are counted within the process (NEURON_RT_VISIBLE_CORES, runtime configuration guide).
    if count != 1 or not 0 <= start_core < len(cores) or not 0 <= rank < world:
        raise NrtError(f"core {start_core} of {len(cores)}, {count} cores, rank {rank} of {world}")
    neuron_rules.nrt_init(rank, 1)
    neuron_rules.fail_process_per_rank(world)
    key = bytes(model.key.tolist()).decode()
    _loaded[key] = rank, world
    # Rule: collective ranks load together (nxd loads in one thread a rank).
    device_of(rank, world).load(rank, key, pickle.loads(bytes(model.neff.tolist())))


torch.ops.neuron._load_collectives_neuron = _load_collectives  # type: ignore[attr-defined]  # a namespace takes any name


def move_trace_to_device(trace: Any, device_id: int) -> None:
    """Moves weights that are not in the program, which these are; else nothing (torch_neuronx's placement API)."""


_jit_load: Callable[..., Any] = torch.jit.load


def _load(*args: Any, **kwargs: Any) -> Any:
    # Rule: "upon torch.jit.load, the model binary executable is automatically moved to a NeuronCore" (trace's API
    # reference), without the other ranks, unless that is switched off.
    if not contexts.disabled():
        raise NrtError("nrt_load: no collectives communicator; load under torch_neuronx.contexts.disable_nrt_load()")
    return _jit_load(*args, **kwargs)


torch.jit.load = _load
