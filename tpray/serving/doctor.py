"""What this machine has, and what tpray would choose on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from tpray import __version__
from tpray.config import ModelConfig, ParallelConfig, cache_dir, environment
from tpray.errors import ConfigError
from tpray.group.cores import describe, usable_cores
from tpray.group.store import Source, check_source
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.plan import Cut, Rule, Split, Unit
from tpray.parallel_layers.shard import apply_plan, decide, empty_model
from tpray.runtime.artifact import MANIFEST_FILE, Artifact, is_artifact
from tpray.runtime.cpu import CpuRuntime, cpu_flags, multiplies_bfloat16, multiplies_int8
from tpray.runtime.neuron_env import detect
from tpray.serving import doctor_neuron
from tpray.serving.finding import Finding

PACKAGES = {"ray": (2, 60), "torch": (2, 9), "transformers": (5, 23)}
"""The oldest versions that tpray was tested with."""


def examine() -> Iterator[Finding]:
    """Every finding, in the order in which a person would ask."""
    yield Finding(
        "tpray",
        f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    )
    yield _system()
    yield from (_package(name, oldest) for name, oldest in PACKAGES.items())
    yield from doctor_neuron.examine(doctor_neuron.Machine(environment()))
    cores = usable_cores()
    yield Finding("cores", f"{len(cores)} usable ({describe(cores)}) of {os.cpu_count()}; {_numa()}")
    yield Finding("instructions", _instructions())
    yield _memory()
    yield _cache(cache_dir())
    if (runtime := detect()) != "cpu":
        yield Finding("auto chooses", f"runtime {runtime}, dtype bfloat16; one NeuronCore a rank")
        return
    chosen = CpuRuntime().choose_dtype("auto")
    reason = "multiplied natively" if multiplies_bfloat16() else "this CPU has no AVX512_BF16 or AMX"
    yield Finding(
        "auto chooses",
        f"runtime cpu, dtype {chosen} (bfloat16 is {reason})"
        if chosen == "bfloat16"
        else f"runtime cpu, dtype {chosen} ({reason})",
    )
    yield Finding(
        "", f"--dtype int8 is {'faster still, a little less exact' if multiplies_int8() else 'not possible here'}"
    )
    yield Finding(
        "",
        ", ".join(f"tp {tp}: {max(1, len(cores) // tp)} cores a rank" for tp in (1, 2, 4) if tp <= len(cores)),
    )


def _system() -> Finding:
    if platform.system() != "Linux":
        return Finding("system", platform.system(), "tpray needs Linux: its wire and core leases are Linux's")
    return Finding("system", platform.platform())


def _package(name: str, oldest: tuple[int, ...]) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", f"pip install '{name}>={'.'.join(map(str, oldest))}'")
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, oldest))
    return Finding(
        name,
        found,
        None if number >= oldest else f"older than the tested {wanted}: pip install '{name}>={wanted}'",
    )


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


def _memory() -> Finding:
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    free, total = values["MemAvailable"], values["MemTotal"]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    value = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB available; /dev/shm {shm / 2**30:.1f} GiB free"
    problem = "Ray needs shared memory: mount a larger /dev/shm (docker run --shm-size=2g)" if shm < 2**28 else None
    return Finding("memory", value, problem)


def _cache(directory: Path) -> Finding:
    kept = [path for path in (directory / "artifacts").glob("*") if is_artifact(path)]
    size = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(directory).free
    value = (
        f"{directory}: {len(kept)} traced artifacts, {size / 2**20:.0f} MiB; {free / 2**30:.1f} GiB free on its disk"
    )
    problem = "less than 1 GiB is free there: set TPRAY_CACHE to a larger disk" if free < 2**30 else None
    return Finding("model cache", value, problem)


@dataclass(frozen=True)
class PlanLine:
    """One rule of a model's plan, and the layers that it decides on.

    layers: how many. whole_bytes: of their parameters in float32, together. rank_bytes: of the largest share.
    """

    pattern: str
    how: str
    layers: int
    whole_bytes: int
    rank_bytes: int
    why: str


def explain_plan(model: ModelConfig, tp: int) -> list[PlanLine]:
    """How ``model`` is sharded over ``tp`` ranks; reads its configuration, and no weight.

    Raises:
        TprayError: as `check_source` does.
    """
    checkpoint = check_source(Source.of(model, ParallelConfig(tp=tp)))
    if isinstance(checkpoint, Artifact):
        raise ConfigError(f"{model.source} is traced already; its plan is in {MANIFEST_FILE}")
    whole = empty_model(checkpoint.config)
    layers: dict[Rule, list[str]] = {}
    for decision in decide(whole, checkpoint.plan):
        layers.setdefault(decision.rule, []).append(decision.path)
    shards = []
    for rank in range(tp):
        shards.append(empty_model(checkpoint.config))
        with parallel_state.use(rank, tp):
            apply_plan(shards[rank], checkpoint.plan, torch.float32)

    def size(model: nn.Module, paths: list[str]) -> int:
        return sum(_bytes(model, path) for path in paths)

    return [
        PlanLine(
            rule.pattern, _how(rule.cut), len(paths), size(whole, paths), max(size(s, paths) for s in shards), rule.why
        )
        for rule, paths in layers.items()
    ]


def _how(cut: Cut) -> str:
    if cut is Cut.REPLICATED:
        return "whole on every rank"
    if cut is Cut.VOCAB:
        return "by vocabulary, all-reduce after"
    by = {Unit.HEAD: "heads", Unit.KEY_VALUE_HEAD: "key/value heads", Unit.FEATURE: "features"}[cut.unit]
    fused = f", {cut.parts} layers in one" if cut.parts > 1 else ""
    return f"{cut.split.value}-parallel by {by}{', all-reduce after' if cut.split is Split.ROW else ''}{fused}"


def _bytes(model: nn.Module, path: str) -> int:
    parent_path, _, leaf = path.rpartition(".")
    found = getattr(model.get_submodule(parent_path), leaf)
    return found.nbytes if isinstance(found, torch.Tensor) else sum(p.nbytes for p in found.parameters())
