"""A group in process: what its steps take, beside the bare program; its idle CPU; its memory."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench import traffic
from tpray.config import DtypeName

SHAPES = ((1, 16), (1, 53), (1, 128), (8, 128))
"""Rows and tokens of the steps that are timed."""
ROUNDS = 3
IDLE_S = 10.0

_BARE = """
import statistics, sys, time, torch
from pathlib import Path
from tpray.artifacts.folder import Artifact
from tpray.parallel_layers import collective, parallel_state
from tpray.runtime.base import SavedShard
from tpray.runtime.cpu.runtime import CpuRuntime

artifact = Artifact.open(Path(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]))
manifest = artifact.manifest
saved = SavedShard(
    artifact.rank_directory(0), 0, 1, manifest.dtype, manifest.buckets, manifest.model.sharding
)
with parallel_state.use(0, 1, collective.SingleRank()), torch.inference_mode():
    program = CpuRuntime(None).load(saved)
    for line in sys.stdin:
        rows, length, repeat = map(int, line.split())
        ids = torch.full((rows, length), 7)
        inputs, times = (ids, torch.ones_like(ids), torch.zeros_like(ids)), []
        for i in range(repeat + 2):
            started = time.perf_counter()
            program(*inputs)
            times.append(time.perf_counter() - started)
        print(statistics.median(times[2:]) * 1e3, flush=True)
"""


def median_s(work: Callable[[], Any], repeat: int = 7, warm_up: int = 2) -> float:
    """The median time of ``work``, seconds."""
    times = []
    for i in range(repeat + warm_up):
        started = time.perf_counter()
        work()
        if i >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def figures(model: Path | None, tp: int, dtype: DtypeName, cores: int, idle: bool = False) -> dict[str, float]:
    """Of a started group, ``cores`` a rank: milliseconds by shape (as the caller and as rank 0 see it, and of the bare
    program where tp is 1), tokens a second, bytes, and shares of a core.

    The start is one from an artifact: what tracing needs is not counted.
    """
    with _started(model, tp, dtype, cores) as classifier:
        return _measure(classifier, cores, idle)


def memory(model: Path | None, tp: int, dtype: DtypeName, cores: int) -> dict[str, float]:
    """Of a started group: bytes of the rank that has most."""
    with _started(model, tp, dtype, cores) as classifier:
        return _memory(classifier.group)


@contextmanager
def _started(model: Path | None, tp: int, dtype: DtypeName, cores: int) -> Iterator[Any]:
    """A group that was started from an artifact; one is made first where there is none."""
    import tpray

    load = partial(tpray.load, model, tp=tp, dtype=dtype, cores=cores)
    classifier = load()
    if classifier.group.traced:
        classifier.close()
        classifier = load()
    with classifier:
        yield classifier


def _measure(classifier: Any, cores: int, idle: bool) -> dict[str, float]:
    group = classifier.group
    pids = [info.pid for info in group.workers]
    found = _memory(group)  # first: of the start, and of nothing after it
    if idle:
        found |= _idle(pids)
    bare: subprocess.Popen[str] | None = None
    if group.tp == 1:
        arguments = [sys.executable, "-c", _BARE, str(group.artifact.directory), str(cores)]
        bare = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for rows, length in SHAPES:
            found |= _times(classifier, bare, rows, length)
    finally:
        if bare is not None:
            bare.communicate(timeout=60)
    batches = traffic.batches(16, 6)

    async def everything() -> None:  # as the batcher does it: two steps in flight
        slots = asyncio.Semaphore(2)

        async def step(batch: Any) -> None:
            async with slots:
                await group.step([x.numpy() for x in batch])

        await asyncio.gather(*map(step, batches))

    seconds = median_s(lambda: classifier._submit(everything()).result(), 3, 1)
    found["tokens/s"] = sum(int(mask.sum()) for _, mask, _ in batches) / seconds
    return found


def _times(classifier: Any, bare: subprocess.Popen[str] | None, rows: int, length: int) -> dict[str, float]:
    """Medians of rounds; the rank and the bare program take turns."""
    repeat = 15 if rows * length <= 128 else 5
    ids = np.full((rows, length), 7)
    inputs, shape = [ids, np.ones_like(ids), np.zeros_like(ids)], f"[{rows}, {length}] ms"
    seen: dict[str, list[float]] = {"": [], "in its rank ": [], "bare ": []}
    for _ in range(ROUNDS):
        for i in range(repeat + 2):
            started = time.perf_counter()
            result = classifier._submit(classifier.group.step(inputs)).result()
            if i >= 2:
                seen[""].append((time.perf_counter() - started) * 1e3)
                seen["in its rank "].append(result.compute_s * 1e3)
        if bare is not None:
            assert bare.stdin is not None
            assert bare.stdout is not None
            bare.stdin.write(f"{rows} {length} {repeat}\n")
            bare.stdin.flush()
            seen["bare "].append(float(bare.stdout.readline()))
    return {f"{whose}{shape}": statistics.median(times) for whose, times in seen.items() if times}


def _memory(group: Any) -> dict[str, float]:
    """Bytes of the rank that has most: its largest resident size so far, its size now, and the weights of its shard."""
    records, pids = group.artifact.manifest.ranks, [info.pid for info in group.workers]
    return {
        "peak bytes": max(_status_bytes(pid, "VmHWM") for pid in pids),
        "resident bytes": max(_status_bytes(pid, "VmRSS") for pid in pids),
        "weight bytes": max(record.sharded_bytes + record.replicated_bytes for record in records),
    }


def _idle(pids: list[int]) -> dict[str, float]:
    """Percent of a core that the ranks use while they wait, and that as many Ray actors use that do nothing."""
    import ray

    class Nothing:
        def pid(self) -> int:
            return os.getpid()

    actors: list[Any] = [ray.remote(Nothing).options(num_cpus=0).remote() for _ in pids]
    others: list[int] = ray.get([actor.pid.remote() for actor in actors])
    time.sleep(2.0)  # their starts end
    before, others_before = _cpu_s(pids), _cpu_s(others)
    time.sleep(IDLE_S)
    used = _cpu_s(pids) - before, _cpu_s(others) - others_before
    for actor in actors:
        ray.kill(actor)
    return {"idle % of a core": used[0] / IDLE_S * 100, "Ray's idle % of a core": used[1] / IDLE_S * 100}


def _status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _cpu_s(pids: list[int]) -> float:
    """User and system time that processes have used, of every thread, seconds."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def engine_figures(run: Any) -> dict[str, float]:
    """The same for another engine in this process: milliseconds by shape, and tokens a second."""
    batches = traffic.batches(16, 6)
    found = {}
    for rows, length in SHAPES:
        ids = torch.full((rows, length), 7)
        inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
        found[f"[{rows}, {length}] ms"] = median_s(partial(run, *inputs), 15 if rows == 1 else 5) * 1e3

    def all_batches() -> None:
        for batch in batches:
            run(*batch)

    return found | {"tokens/s": sum(int(mask.sum()) for _, mask, _ in batches) / median_s(all_batches, 3, 1)}
