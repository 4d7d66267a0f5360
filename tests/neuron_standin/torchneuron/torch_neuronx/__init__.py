"""A stand-in for TorchNeuron (torch-neuronx 2.13): the device, the process group and the compiler of that name.

It computes on the CPU and checks what the real one does; each rule names its source. ``neuron_rules`` has the rules of
the runtime below it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from neuron_rules import ENV, NrtError, ProcessExchange, check_process_rank, compile_log, nrt_init, same_call
from torch.fx import GraphModule, Interpreter
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

__version__ = "2.13.3.0"

rename_privateuse1_backend("neuron")
torch.ops.load_library(os.environ["NEURON_STANDIN_DEVICE"])


class _Module:
    """torch.neuron."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


torch._register_device_module("neuron", _Module)
generate_methods_for_privateuse1_backend()

_exchange: ProcessExchange | None = None


def _process_group(store: Any, rank: int, world: int, timeout: Any) -> Any:
    global _exchange
    # Rule: init_process_group("neuron") asserts that the runtime is not initialised (TorchNeuron's distributed guide).
    if torch.ops.neuron_standin_device.was_used():
        raise AssertionError("the Neuron runtime was initialised before init_process_group")
    check_process_rank(rank, world)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ[name]
    nrt_init(rank, world)
    _exchange = ProcessExchange(store, rank, world)  # all ranks meet here: it is the barrier at the end
    return _exchange.group


dist.Backend.register_backend("neuron", _process_group, devices=["neuron"])


class _OnHost(Interpreter):
    """Runs a compiled graph with CPU tensors, and its collectives between the ranks."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        if "_c10d_functional" not in name:
            return super().call_function(target, args, kwargs)
        if "wait_tensor" in name:
            return args[0]
        if _exchange is None:
            raise NrtError("a collective ran before init_process_group")
        x = args[0]
        same_call(_exchange.gather, name, x)
        parts = _exchange.gather(x)
        if "all_reduce" in name:
            return torch.stack(parts).sum(0)
        if "all_gather_into_tensor" in name:
            return torch.cat(parts)
        if "broadcast" in name:
            return parts[args[1]].clone()
        raise NotImplementedError(name)


def _neff(module: GraphModule, inputs: list[Any]) -> None:
    """Compile once: Rule: what was compiled is found in TORCH_NEURONX_NEFF_CACHE_DIR again (third parties' reports)."""
    shapes = [(tuple(x.shape), str(x.dtype)) for x in inputs]
    key = hashlib.sha256(f"{module.code} {shapes}".encode()).hexdigest()[:24]
    folder = Path(ENV["TORCH_NEURONX_NEFF_CACHE_DIR"]) / key
    if (folder / "graph.neff").is_file():
        return
    compile_log(Path(os.environ["NEURON_STANDIN_DIR"]) / f"compile-{key}-{os.getpid()}", key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.neff").write_text(key)
    with (Path(os.environ["NEURON_STANDIN_DIR"]) / "compiled").open("a") as file:
        file.write(f"{key}\n")


def neuron(module: GraphModule, inputs: list[Any]) -> Any:
    """The backend of torch.compile."""
    for x in inputs:
        # Rule: shapes are static: dynamic=False, and no graph has a symbol (TorchNeuron's torch.compile guide).
        if isinstance(x, torch.SymInt) or any(isinstance(size, torch.SymInt) for size in x.shape):
            raise RuntimeError("the neuron backend takes static shapes: compile with dynamic=False")
        if x.device.type != "neuron":
            raise RuntimeError(f"an input of the program is on {x.device}: move the module to the device first")
    for node in module.graph.nodes:
        # Rule: a compiler knows ATen and c10d's functional collectives, and no operators of others.
        if node.op == "call_function" and str(node.target).startswith("tpray"):
            raise RuntimeError(f"unsupported operator {node.target}")
        if node.op == "call_function" and str(node.kwargs.get("device", "neuron")).startswith("cpu"):
            raise RuntimeError(f"{node.target} makes a tensor on the CPU inside the program")
    _neff(module, inputs)

    def run(*arguments: torch.Tensor) -> list[torch.Tensor]:
        for argument, example in zip(arguments, inputs, strict=True):
            if tuple(argument.shape) != tuple(example.shape):
                raise NrtError(f"compiled for {tuple(example.shape)}, called with {tuple(argument.shape)}")
        outputs = _OnHost(module).run(*(argument.to("cpu") for argument in arguments))
        return [output.to("neuron") for output in outputs]

    return run


torch._dynamo.register_backend(neuron, name="neuron")
