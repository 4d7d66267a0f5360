"""A stand-in for TorchNeuron (torch-neuronx 2.13): the device, the process group and the compiler of that name.

It computes on the CPU and checks what the real one does. Each rule names its source; a file without more is one of
TorchNeuron's public source, 0.1.0, below ``torch_neuronx``. ``neuron_rules`` has the rules of the runtime below it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from neuron_rules import NrtError, ProcessExchange, compile_log, nrt_init, same_call, visible_cores
from torch.fx import GraphModule, Interpreter
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

log = logging.getLogger(__name__)

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
        return _local_rank

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


torch._register_device_module("neuron", _Module)
generate_methods_for_privateuse1_backend()

_exchange: ProcessExchange | None = None
_local_rank = 0


def _process_group(store: Any, rank: int, world: int, timeout: Any) -> Any:
    """Rules of distributed/backend.py, _neuron_runtime_setup."""
    global _exchange, _local_rank
    if torch.ops.neuron_standin_device.was_used():
        raise AssertionError("the Neuron runtime was initialised before init_process_group")
    _local_rank = int(os.environ.get("LOCAL_RANK", rank))  # without it, by the addresses of the ranks' machines
    if not os.environ.get("NEURON_RT_VISIBLE_CORES"):
        os.environ["NEURON_RT_VISIBLE_CORES"] = str(_local_rank)
    if "NEURON_RT_ROOT_COMM_ID" not in os.environ:
        if rank == 0:
            store.set("root", _free_address())
        os.environ["NEURON_RT_ROOT_COMM_ID"] = store.get("root").decode()
    torch.ops.neuron_standin_device.set_index(_local_rank)
    nrt_init(rank, world)
    if len(visible_cores()) != 1:
        raise AssertionError(f"a process of a group has one core, and this one sees {visible_cores()}")
    _exchange = ProcessExchange(store, rank, world)  # all ranks meet here: it is the barrier at the end
    return _exchange.group


def _free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


dist.Backend.register_backend("neuron", _process_group, devices=["neuron"])


class _OnHost(Interpreter):
    """Runs a graph with CPU tensors, and its collectives between the ranks."""

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
        raise NotImplementedError(name)


def _neff(module: GraphModule, inputs: list[Any]) -> None:
    """Compile once. Rules: what was compiled is found in TORCH_NEURONX_NEFF_CACHE_DIR again, and one process compiles
    it, under a lock in TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR (csrc/core/cache/CompilationCache.cpp)."""
    shapes = [(tuple(x.shape), str(x.dtype)) for x in inputs]
    key = hashlib.sha256(f"{module.code} {shapes}".encode()).hexdigest()[:24]
    locks = Path(os.environ.get("TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR", "/tmp/local_cache")) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    folder = Path(os.environ["TORCH_NEURONX_NEFF_CACHE_DIR"]) / key
    with (locks / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "graph.neff").is_file():
            return
        # Rule: the compiler is looked for on PATH (kernels/compiler_subprocess.py).
        if shutil.which("neuronx-cc") is None:
            raise RuntimeError("there is no neuronx-cc on PATH")
        compile_log(Path(os.environ["NEURON_STANDIN_DIR"]) / f"compile-{key}-{os.getpid()}", key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "graph.neff").write_text(key)
    with (Path(os.environ["NEURON_STANDIN_DIR"]) / "compiled").open("a") as file:
        file.write(f"{key}\n")


COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "wait_tensor")
"""Rule: the compiler knows these of c10d's functional collectives, and no broadcast
(neuron_dynamo_backend/fx/passes/collective_legalization.py)."""


def neuron(module: GraphModule, inputs: list[Any]) -> Any:
    """The backend of torch.compile."""
    for x in inputs:
        # Rule: shapes are static: dynamic=True is rejected (AWS's "torch.compile backend reference").
        if isinstance(x, torch.SymInt) or any(isinstance(size, torch.SymInt) for size in x.shape):
            raise RuntimeError("the neuron backend takes static shapes: compile with dynamic=False")
    for node in module.graph.nodes:
        # Rule: what has no lowering to StableHLO is an error (neuron_dynamo_backend/fx/fx_transform.py).
        if node.op == "call_function" and (
            str(node.target).startswith("tpray")
            or (str(node.target).startswith("_c10d") and str(node.target).split(".")[1] not in COLLECTIVES)
        ):
            raise RuntimeError(f"unsupported operator {node.target}")
    _neff(module, inputs)

    def execute(*arguments: torch.Tensor) -> Any:
        if os.environ.get("NEURON_STANDIN_FAIL_EXECUTION"):  # a test asks for that
            raise NrtError("nrt_execute failed with 1")
        return uncompiled(*arguments)

    def uncompiled(*arguments: torch.Tensor) -> Any:
        # Rule: inputs on the CPU are copied to the device (neuron_dynamo_backend/executor.py, _prepare_inputs).
        outputs = _OnHost(module).run(*(argument.to("cpu") for argument in arguments))
        return [output.to("neuron") for output in outputs]

    def run(*arguments: torch.Tensor) -> Any:
        # Rule: what fails on the core is run uncompiled, unless a variable says no (neuron_dynamo_backend/backend.py).
        # Of 2.13 AWS's page of environment variables says that 1 is the default; 0.1.0's default is 0.
        try:
            return execute(*arguments)
        except NrtError as e:
            if os.environ.get("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION", "0") == "1":
                raise
            log.warning("falling back to the uncompiled graph: %s", e)
            return uncompiled(*arguments)

    return run


torch._dynamo.register_backend(neuron, name="neuron")
