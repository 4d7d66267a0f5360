"""How cost grows: time per token over length, batch and degree, in process; throughput over clients, over HTTP."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench import servers, traffic
from tests.bench.groups import median_s
from tests.bench.servers import Point

LENGTHS = (16, 32, 64, 128, 256, 512)
BATCHES = (1, 4, 16, 64)
DEGREES = (1, 2, 4)
CLIENTS = (1, 10, 100, 300, 1000)


def measure(model: Path, out: Path, short: bool) -> None:
    """Measure both; write growth.json and growth.png into ``out``."""
    per_token = {tp: micros_per_token(model, tp, short) for tp in DEGREES}
    command = [
        sys.executable,
        "-m",
        "tpray",
        "serve",
        "--tp",
        "2",
        "--max-concurrent-requests",
        "4096",
        "--port",
        "PORT",
    ]
    with servers.server(command) as url:
        clients = servers.load(url, [list(pair) for pair in traffic.pairs(512)], CLIENTS, 4.0, {})
    for tp, cells in per_token.items():
        print(f"   tp {tp}, µs a token:", {name: round(micros) for name, micros in cells.items()})
    print("   the demo, requests/s by clients:", {n: round(point.per_second) for n, point in clients.items()})
    stored = {"per_token": per_token, "clients": {n: asdict(point) for n, point in clients.items()}}
    (out / "growth.json").write_text(json.dumps(stored, indent=2) + "\n")
    with contextlib.suppress(ImportError):
        plot(per_token, clients, out / "growth.png")


def micros_per_token(model: Path, tp: int, short: bool) -> dict[str, float]:
    """Microseconds per token of full rows, by "batch x length"; one thread a rank, dtype auto."""
    import tpray

    found = {}
    with tpray.load(model, tp=tp, cores=1) as classifier:
        for length in LENGTHS:
            for batch in BATCHES:
                tokens = batch * length
                if tokens > (2048 if short else 32768):
                    continue
                ids = torch.full((batch, length), 7)
                repeat = max(1, min(7, 8192 // tokens))
                seconds = median_s(partial(classifier.logits, input_ids=ids), repeat, 1)
                found[f"{batch} x {length}"] = seconds / tokens * 1e6
    return found


def plot(per_token: dict[int, dict[str, float]], clients: dict[int, Point], path: Path) -> None:
    """Draw both into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + len(per_token), figsize=(5 * (1 + len(per_token)), 4))
    for axis, (tp, cells) in zip(axes[:-1], per_token.items(), strict=True):
        for batch in BATCHES:
            found = [(n, cells[f"{batch} x {n}"]) for n in LENGTHS if f"{batch} x {n}" in cells]
            axis.plot(*zip(*found, strict=True), marker="o", label=f"batch {batch}")
        axis.set(title=f"tp {tp}", xlabel="tokens a row", ylabel="µs a token", xscale="log", yscale="log")
        axis.legend()
    last: Any = axes[-1]
    last.plot(list(clients), [point.per_second for point in clients.values()], marker="o")
    last.set(title="demo over HTTP", xlabel="clients", ylabel="requests/s", xscale="log", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
