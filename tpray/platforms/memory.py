"""How much memory a new process may use on this machine."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes. available: without swapping, and within the control group's limit. total: of the machine, or the limit."""

    available: int
    total: int
    limited: bool = False  # by a control group


def memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> Memory:
    """The system's memory, or less if a control group limits it.

    Source: MemAvailable and MemTotal of proc(5); memory.max and memory.current of the kernel's cgroup v2 documentation.
    """
    values = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    available, total = values["MemAvailable"], values["MemTotal"]
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return Memory(available, total)
    return Memory(min(available, limit - used), min(total, limit), limit < total)


def available_bytes() -> int:
    """What a new process may use, bytes."""
    return memory().available


def return_free_memory() -> None:
    """Give the system back what this process has freed: the C library keeps blocks that lie between others.

    Source: malloc_trim(3). Where the C library has no such call, nothing happens.
    """
    gc.collect()  # a traced program is full of cycles
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
