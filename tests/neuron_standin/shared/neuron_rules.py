"""What both stand-ins check, as Neuron's runtime (NRT) does. Each rule names where it comes from."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CLAIMS = Path(os.environ["NEURON_STANDIN_DIR"])
CORES = int(os.environ.get("NEURON_STANDIN_CORES", "8"))

# Rule: the runtime reads its variables when it is initialised, not before: TorchNeuron itself sets some right before
# that (its distributed/backend.py, _set_rt_visible_cores).
ENV = os.environ

_held: list[Any] = []
_lock = threading.Lock()


class NrtError(RuntimeError):
    """What nrt_init and nrt_execute raise."""


def visible_cores() -> list[int]:
    """Those of this process.

    Rules of the runtime configuration guide: NEURON_RT_VISIBLE_CORES is a number or a range FIRST-LAST, and wins over
    NEURON_RT_NUM_CORES; without either a process has all cores. (Its page on Kubernetes has a list, ``2,3``.)
    """
    wanted = ENV.get("NEURON_RT_VISIBLE_CORES")
    if not wanted:
        return list(range(int(ENV.get("NEURON_RT_NUM_CORES", CORES))))
    cores: list[int] = []
    for part in wanted.split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    if max(cores) >= CORES:
        raise NrtError(f"NEURON_RT_VISIBLE_CORES={wanted}, and there are {CORES} cores")
    return cores


def nrt_init(rank: int, world: int) -> None:
    """Take this process's cores and meet the group's root; once."""
    with _lock:
        if _held:
            return
        for core in visible_cores():
            # Rule: a core belongs to one process until that exits ("Logical Neuron Core(s) not available", sdk 1338).
            file = (CLAIMS / f"nc-{core}").open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise NrtError(
                    f"nrt_init: Logical Neuron Core(s) not available - Requested:{core} Available:0; "
                    f"held by pid {file.read()}"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            _held.append(file)
        if world > 1:
            # Rule: NEURON_RT_ROOT_COMM_ID is mandatory for collectives; rank 0 listens there (runtime guide).
            host, _, port = ENV.get("NEURON_RT_ROOT_COMM_ID", "").rpartition(":")
            if not host:
                raise NrtError("nrt_init: NEURON_RT_ROOT_COMM_ID is not set, and there are collectives")
            if rank == 0:
                listener = socket.socket()
                listener.bind((host, int(port)))  # fails if another group has the port
                listener.listen()
                _held.append(listener)


def fail_process_per_rank(world: int) -> None:
    """Fail to load in a process that holds some of a group's cores only, in the way that a test asks for."""
    way = os.environ.get("NEURON_STANDIN_PROCESS_PER_RANK")
    if way is None or len(visible_cores()) >= world:
        return
    if way == "exit":
        os._exit(139)
    if way == "hang":
        time.sleep(600)
    raise NrtError("nrt_load_collectives status=2")


class ProcessExchange:
    """Ranks that are processes, over gloo on loopback."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self.rank, self.world = rank, world
        self.group = gloo(store, rank, world, options)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        self.group.allgather([parts], [x.contiguous()]).wait()
        return parts


def same_call(gather: Any, name: str, x: torch.Tensor) -> None:
    """Rule: all ranks enter the same collective with the same shape and dtype; else the device hangs (sdk 713)."""
    hang = CLAIMS / "hang"
    if os.environ.get("RANK") == "1" and hang.exists():  # a test asks for a rank that never comes
        hang.unlink()
        time.sleep(600)
    said = json.dumps([name, list(x.shape), str(x.dtype)]).ljust(120).encode()
    heard = {bytes(part.tolist()) for part in gather(torch.tensor(list(said), dtype=torch.uint8))}
    if len(heard) != 1:
        raise NrtError(f"the ranks are in different collectives: {sorted(heard)}")


def compile_log(folder: Path, key: str) -> None:
    """What neuronx-cc would do with a program; it fails, with a log, when a test asks for that."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"INFO: pass {i} of the program {key}" for i in range(40)]
    if os.environ.get("NEURON_STANDIN_FAIL_COMPILE"):
        lines += ["ERROR: [NCC_EVRF004] the operator frobnicate is not supported", "Compiler status ERROR"]
        (folder / "log-neuron-cc.txt").write_text("\n".join(lines))
        raise RuntimeError("neuronx-cc failed with 70: " + lines[-2])
    (folder / "log-neuron-cc.txt").write_text("\n".join(lines))
