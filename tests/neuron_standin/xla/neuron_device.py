"""NeuronCores that are XLA's CPU backend: the programs of all ranks, run as the replicas of one HLO module.

jaxlib has that backend; torch-xla's own deadlocks with more than one device. Ranks that are threads of a process share
a `Cores`; where they are processes, rank 0's has it, and the others reach it at NEURON_RT_ROOT_COMM_ID.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from neuron_rules import CLAIMS, ENV, NrtError, visible_cores
from torch import Tensor

Array = Any  # numpy's, of any dtype, bfloat16 included


@dataclass(frozen=True)
class Program:
    """A lowered module of one rank. Parameters of the HLO by number: those it holds, the inputs, and the states.

    states: -> the output that is the next value. text: the HLO as torch-xla prints it.
    """

    hlo: bytes
    text: str
    parameters: dict[int, Array]
    inputs: dict[int, int]
    states: dict[int, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of the HLO, without the module's name, which counts up."""
        lines = self.text.splitlines()
        return hashlib.sha256("\n".join(line for line in lines if "PyLoweringContext" not in line).encode()).hexdigest()


def as_numpy(x: Tensor) -> Array:
    """A CPU tensor's array."""
    x = x.detach().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


def as_tensor(x: Array) -> Tensor:
    """An array's tensor."""
    own = np.array(x)
    if own.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


class Device(Protocol):
    def load(self, rank: int, key: str, program: Program) -> None: ...

    def run(self, rank: int, key: str, inputs: Sequence[Array]) -> list[Array]: ...


class Cores:
    """All ranks' cores. A call returns when every rank has made its own, as on the device."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._condition = threading.Condition()
        self._calls: dict[int, Any] = {}
        self._results: list[Any] = []
        self._turn = 0
        self._programs: dict[str, tuple[Any, list[Program], list[dict[int, Array]]]] = {}  # by rank 0's key
        self._keys: dict[str, str] = {}  # a rank's key -> rank 0's

    def load(self, rank: int, key: str, program: Program) -> None:
        self._meet(rank, ("load", key, program), self._load)

    def run(self, rank: int, key: str, inputs: Sequence[Array]) -> list[Array]:
        hang = CLAIMS / "hang"
        if rank == 1 and hang.exists():  # a test asks for a rank that never comes
            hang.unlink()
            time.sleep(600)
        result: list[Array] = self._meet(rank, ("run", key, inputs), self._run)
        return result

    def _meet(self, rank: int, call: Any, act: Callable[[list[Any]], list[Any]]) -> Any:
        with self._condition:
            turn = self._turn
            self._calls[rank] = call
            if len(self._calls) == self.world:
                calls = [self._calls[i] for i in range(self.world)]
                try:
                    if len({kind for kind, *_ in calls}) > 1:
                        raise NrtError("some ranks load and some run")
                    self._results = act(calls)
                except Exception as e:  # noqa: BLE001  # every rank must hear of it
                    self._results = [e] * self.world
                self._calls = {}
                self._turn += 1
                self._condition.notify_all()
            else:
                self._condition.wait_for(lambda: self._turn > turn)
            result = self._results[rank]
        if isinstance(result, Exception):
            raise result
        return result

    def _load(self, calls: list[Any]) -> list[Any]:
        keys, programs = [key for _, key, _ in calls], [program for *_, program in calls]
        record(programs)
        if len({program.digest for program in programs}) > 1:
            raise NrtError("the ranks' programs differ, and can only be executed here as replicas of one")
        self._programs[keys[0]] = compile_for(programs[0], self.world), programs, [{} for _ in programs]
        self._keys |= dict.fromkeys(keys, keys[0])
        return [None] * self.world

    def _run(self, calls: list[Any]) -> list[Any]:
        names = {self._keys[key] for _, key, _ in calls}
        if len(names) > 1:
            raise NrtError("the ranks run different programs: the device would hang")
        executable, programs, states = self._programs[names.pop()]
        held = [
            {**p.parameters, **{i: own[2][n] for i, n in p.inputs.items()}, **state}
            for p, own, state in zip(programs, calls, states, strict=True)
        ]
        outputs = execute(executable, held)
        for program, state, own in zip(programs, states, outputs, strict=True):
            state.update({i: own[n] for i, n in program.states.items()})
        return outputs


def record(programs: Sequence[Program]) -> None:
    """Keep what was loaded, for a test that asks for it."""
    if (folder := os.environ.get("NEURON_STANDIN_KEEP")) is not None:
        for rank, program in enumerate(programs):
            (Path(folder) / f"{time.time_ns()}-{rank}.txt").write_text(program.text)


def compile_for(program: Program, world: int) -> Any:
    """The HLO compiled by XLA for ``world`` replicas on as many CPU devices."""
    import jax

    if not jax._src.xla_bridge.backends_are_initialized():
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
    from jaxlib import _jax, xla_client

    devices = jax.devices()[:world]
    options = xla_client.CompileOptions()
    options.num_replicas = options.executable_build_options.num_replicas = world
    options.device_assignment = xla_client.DeviceAssignment.create(np.arange(world)[:, None])
    module = _jax.mlir.hlo_to_stablehlo(program.hlo)
    return devices[0].client.compile_and_load(module, xla_client.DeviceList(tuple(devices)), options)


def execute(executable: Any, held: Sequence[dict[int, Array]]) -> list[list[Array]]:
    """Every replica's outputs, of what each holds, by the number of the parameter."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.devices()[: len(held)]
    mesh = Mesh(np.array(devices), ("rank",))

    def spread(number: int) -> Any:
        parts = [jax.device_put(np.atleast_1d(own[number]), device) for own, device in zip(held, devices, strict=True)]
        shape = held[0][number].shape
        if not shape:
            parts = [part.reshape(()) for part in parts]
            return jax.make_array_from_single_device_arrays((), NamedSharding(mesh, PartitionSpec()), parts)
        whole = (len(held) * shape[0], *shape[1:])
        return jax.make_array_from_single_device_arrays(whole, NamedSharding(mesh, PartitionSpec("rank")), parts)

    made = executable.execute_sharded([spread(number) for number in range(len(held[0]))])
    columns = made.disassemble_into_single_device_arrays()
    return [[np.asarray(column[rank]) for column in columns] for rank in range(len(held))]


class RemoteCores:
    """Another process's `Cores`, as rank 0's process has them."""

    def __init__(self, address: tuple[str, int]) -> None:
        give_up = time.monotonic() + 60
        while True:
            try:
                self._connection = Client(address)
                break
            except ConnectionRefusedError:
                if time.monotonic() > give_up:
                    raise NrtError("rank 0 does not listen at NEURON_RT_ROOT_COMM_ID") from None
                time.sleep(0.05)

    def load(self, rank: int, key: str, program: Program) -> None:
        self._ask("load", rank, key, program)

    def run(self, rank: int, key: str, inputs: Sequence[Array]) -> list[Array]:
        result: list[Array] = self._ask("run", rank, key, list(inputs))
        return result

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        result = self._connection.recv()
        if isinstance(result, Exception):
            raise result
        return result


def _serve(cores: Cores, connection: Connection) -> None:
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(cores, method)(*arguments))
        except Exception as e:  # noqa: BLE001  # it is the other process's
            connection.send(e)


_devices: dict[int, Device] = {}
_lock = threading.Lock()


def device_of(rank: int, world: int) -> Device:
    """The cores of a group, seen from the process of one of its ranks, or of all."""
    with _lock:
        if world not in _devices:
            _devices[world] = _make(rank, world)
        return _devices[world]


def _make(rank: int, world: int) -> Device:
    if len(visible_cores()) >= world:  # one process for all ranks
        return Cores(world)
    # Rule: NEURON_RT_ROOT_COMM_ID is mandatory for collectives of several processes (runtime configuration guide).
    host, _, port = ENV.get("NEURON_RT_ROOT_COMM_ID", "").rpartition(":")
    if not host:
        raise NrtError("nrt_init: NEURON_RT_ROOT_COMM_ID is not set, and there are collectives")
    if rank != 0:
        return RemoteCores((host, int(port)))
    cores, listener = Cores(world), Listener((host, int(port)))

    def accept() -> None:
        for _ in range(world - 1):
            threading.Thread(target=_serve, args=(cores, listener.accept()), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return cores
