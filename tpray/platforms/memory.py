"""How much memory a new process may use on this machine, and how much of its cores: what a control group limits."""

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

    What a group uses contains what it has read of files. The kernel takes such pages back when memory is wanted, so
    that they count as available (``active_file`` and ``inactive_file``), as they do in MemAvailable.

    Source: MemAvailable and MemTotal of proc(5); memory.max, memory.current and memory.stat of the kernel's cgroup v2
    documentation.
    """
    values = _numbers(meminfo)
    available, total = values["MemAvailable:"] * 1024, values["MemTotal:"] * 1024
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = _numbers(cgroup / "memory.stat")
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return Memory(available, total)
    files = stat["active_file"] + stat["inactive_file"]
    return Memory(min(available, limit - max(0, used - files)), min(total, limit), limit < total)


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {name: int(number) for name, number, *_ in lines}


def core_limit(cgroup: Path = CGROUP) -> int | None:
    """How many cores' time a control group grants, rounded down and at least one; None: it does not limit it.

    Source: cpu.max of the kernel's cgroup v2 documentation: the time in each period, and the period.
    """
    try:
        granted, period = (cgroup / "cpu.max").read_text().split()
        return max(1, int(granted) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return None


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


def keep_imports() -> None:
    """Have the collector of cycles leave alone what there is: modules stay, and each full collection looked at them.

    Call it where nothing was made yet that may go. Source: gc.freeze of Python's documentation.
    """
    gc.collect()
    gc.freeze()


def memory_of(pid: int) -> int | None:
    """Bytes of memory of a process, a page that several share divided among them; None: it is gone, or not ours.

    Source: Pss of smaps_rollup, proc(5).
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None
