"""The parts of a step on their own: fan-out, all-reduce, matrix products, and the memory that loading needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.bench.groups import median_s


def gemm_ceiling(dtype: torch.dtype, threads: int) -> float:
    """GFLOP/s of oneDNN on the feed-forward's first product for [8, 128], the best of several."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = torch.randn(1024, 768).to(dtype), torch.randn(3072, 768).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
        linear = torch.ops.mkldnn._linear_pointwise
        with torch.inference_mode():
            seconds = median_s(lambda: linear(x, packed, None, "none", [], ""), 25)
    finally:
        torch.set_num_threads(before)
    return 2 * 1024 * 768 * 3072 / seconds / 1e9


_ALL_REDUCE = """
import os, statistics, sys, time, torch
from tpray.parallel_layers.gloo import GlooCollective
from tpray.parallel_layers.shared_memory import SharedMemoryCollective
rank, kind, fd = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
cores = sorted(os.sched_getaffinity(0)); os.sched_setaffinity(0, {cores[rank % len(cores)]})
member = (SharedMemoryCollective if kind == "shared" else GlooCollective)(rank, 2, fd, 60.0)
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(128, 768).to(dtype)
    times = []
    for i in range(500):
        started = time.perf_counter(); member.all_reduce(x); times.append(time.perf_counter() - started)
    print(statistics.median(times[100:]) * 1e6)
"""


def all_reduce_us() -> dict[str, dict[str, float]]:
    """Microseconds of an all-reduce of [128, 768] between two processes, float32 and bfloat16, each way."""
    found = {}
    for kind in ("shared", "gloo"):
        fd = os.memfd_create(kind)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _ALL_REDUCE, str(rank), kind, str(fd)],
                pass_fds=[fd], stdout=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        printed = ranks[0].communicate(timeout=120)[0].split()
        found[kind] = dict(zip(("fp32", "bf16"), map(float, printed), strict=True))
        ranks[1].wait(timeout=60)
        os.close(fd)
    return found


_LOADING = """
import sys, threading, time, torch
from pathlib import Path
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.shard import build_shard
from tpray.parallel_layers.stock import empty_model
from transformers import AutoModelForSequenceClassification
model, tp = sys.argv[1], int(sys.argv[2])

def anonymous():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

checkpoint = find_checkpoint(model)
empty_model(checkpoint.config)  # what is imported on the way is not the shard's
base = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
with parallel_state.use(0, tp):
    shard = build_shard(checkpoint, torch.float32)
done.set()
watcher.join()
sizes = [p.nbytes for p in shard.parameters()]
print(peak - base, sum(sizes), max(sizes))
"""


def loading_bytes(model: Path, tp: int) -> dict[str, int]:
    """What rank 0 of ``tp`` needs while it reads its shard: its peak over the process's baseline, the shard itself, and
    the shard's largest tensor. Anonymous memory: pages of the checkpoint's file can be dropped and read again."""
    printed = subprocess.run(
        [sys.executable, "-c", _LOADING, str(model), str(tp)], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    return dict(zip(("peak", "shard", "largest"), map(int, printed.split()[-3:]), strict=True))


def fan_out_us() -> tuple[float, float]:
    """Microseconds of an empty step to two ranks and back, over the group's wire and as plain actor calls."""
    import numpy as np
    import ray

    from tpray.group import wire
    from tpray.group.wire import Frame, Kind
    from tpray.local_ray.local import start_ray, stop_ray

    payload = (np.zeros((4, 32), dtype=np.int64),)
    script = (
        "import sys\nfrom tpray.group import wire\nfrom tpray.group.wire import Frame, Kind\n"
        "sock, _ = wire.connect('\\0' + sys.argv[1], sys.argv[2], int(sys.argv[3]), 1, 60.0)\n"
        "while (frame := wire.receive(sock)) is not None:\n"
        "    sock.sendall(Frame(Kind.RESULT, frame.step, frame.tensors).encode())\n"
    )
    listener = wire.Listener()
    arguments = [listener.address[1:], listener.token]
    peers = [subprocess.Popen([sys.executable, "-c", script, *arguments, str(rank)]) for rank in range(2)]
    fd = os.memfd_create("unused")
    sockets = listener.accept(2, [fd], 60.0)

    def step() -> None:
        frame = Frame(Kind.STEP, 1, payload).encode()
        for sock in sockets:
            sock.sendall(frame)
        for sock in sockets:
            wire.receive(sock)

    over_wire = median_s(step, 2000, 200) * 1e6
    for sock in sockets:
        sock.close()
    for peer in peers:
        peer.wait(timeout=30)

    class Echo:
        def step(self, inputs: Any) -> Any:
            return inputs

    start_ray(2)
    try:
        actors: list[Any] = [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(2)]
        over_ray = median_s(lambda: ray.get([a.step.remote(payload) for a in actors]), 1000, 100) * 1e6
    finally:
        stop_ray()
    return over_wire, over_ray
