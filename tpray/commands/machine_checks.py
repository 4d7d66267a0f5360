"""What this machine has, and what tpray would choose on it."""

from __future__ import annotations

import os
import platform as system
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tpray.artifacts.folder import is_artifact
from tpray.commands import neuron_checks
from tpray.commands.check import Check
from tpray.config import AUTO, cache_dir, environment
from tpray.platforms import platform_for
from tpray.platforms.cores import core_count, describe, share_of_cores, usable_cores
from tpray.platforms.cpu import cpu_flags, native_dtypes
from tpray.platforms.memory import core_limit, memory
from tpray.version import __version__

PACKAGES = {"ray": (2, 60), "torch": (2, 9), "transformers": (5, 23)}
"""The oldest versions that tpray was tested with."""


def examine() -> Iterator[Check]:
    """Every check, in the order in which a person would ask."""
    yield Check(
        "tpray",
        f"{__version__}, Python {system.python_version()}, {system.system()} {system.machine()}",
    )
    yield _system()
    yield from (_package(name, oldest) for name, oldest in PACKAGES.items())
    yield from neuron_checks.examine(neuron_checks.Machine(environment()))
    yield _cores()
    yield Check("instructions", _instructions())
    yield _memory()
    yield _cache(cache_dir())
    platform = platform_for(AUTO)
    chosen = platform.choose_dtype(AUTO)
    if platform.name != "cpu":
        yield Check(
            "auto chooses", f"runtime {platform.name}, dtype {chosen}; one of the {platform.resource_label} a rank"
        )
        return
    reason = "multiplied natively" if "bfloat16" in native_dtypes() else "this CPU has no AVX512_BF16 or AMX"
    yield Check(
        "auto chooses",
        f"runtime cpu, dtype {chosen} (bfloat16 is {reason})"
        if chosen == "bfloat16"
        else f"runtime cpu, dtype {chosen} ({reason})",
    )
    yield Check(
        "",
        f"--dtype int8 is {'faster still, a little less exact' if 'int8' in native_dtypes() else 'not possible here'}",
    )
    cores = core_count()
    yield Check("", ", ".join(f"tp {tp}: {share_of_cores(cores, tp)} cores a rank" for tp in (1, 2, 4) if tp <= cores))


def _system() -> Check:
    if system.system() != "Linux":
        return Check("system", system.system(), "tpray needs Linux: its wire and core leases are Linux's")
    return Check("system", system.platform())


def _package(name: str, oldest: tuple[int, ...]) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "missing", f"pip install '{name}>={'.'.join(map(str, oldest))}'")
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, oldest))
    return Check(
        name,
        found,
        None if number >= oldest else f"older than the tested {wanted}: pip install '{name}>={wanted}'",
    )


def _cores() -> Check:
    cores, limit = usable_cores(), core_limit()
    limited = "" if limit is None else f", the time of {limit} of them (a control group's limit)"
    return Check("cores", f"{len(cores)} usable ({describe(cores)}) of {os.cpu_count()}{limited}; {_numa()}")


def _numa() -> str:
    nodes = [node for node in Path("/sys/devices/system/node").glob("node[0-9]*") if (node / "cpulist").is_file()]
    if len(nodes) < 2:
        return "one NUMA node"
    lists = sorted(f"{node.name} {(node / 'cpulist').read_text().strip()}" for node in nodes)
    return f"{len(nodes)} NUMA nodes: {', '.join(lists)}"


def _instructions() -> str:
    known = {
        "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512_BF16", "avx512_vnni": "AVX512_VNNI (int8)",
        "avx_vnni": "AVX_VNNI (int8)", "amx_bf16": "AMX_BF16", "amx_int8": "AMX_INT8", "asimd": "NEON", "bf16": "BF16",
    }  # fmt: skip
    found = [name for flag, name in known.items() if flag in cpu_flags()]
    return ", ".join(found) or "none of those that matter here"


def _memory() -> Check:
    found = memory()
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    limit = " (a control group's limit)" if found.limited else ""
    value = (
        f"{found.available / 2**30:.1f} of {found.total / 2**30:.1f} GiB{limit} available; /dev/shm "
        f"{shm / 2**30:.1f} GiB free"
    )
    problem = "Ray needs shared memory: mount a larger /dev/shm (docker run --shm-size=2g)" if shm < 2**28 else None
    return Check("memory", value, problem)


def _cache(directory: Path) -> Check:
    kept = [path for path in (directory / "artifacts").glob("*") if is_artifact(path)]
    size = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(directory).free
    value = (
        f"{directory}: {len(kept)} traced artifacts, {size / 2**20:.0f} MiB; {free / 2**30:.1f} GiB free on its disk"
    )
    problem = "less than 1 GiB is free there: set TPRAY_CACHE to a larger disk" if free < 2**30 else None
    return Check("model cache", value, problem)
