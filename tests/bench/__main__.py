"""Run the side-by-side and print the table of targets; see ``--help``.

Everything of one table is measured in one run, because machines differ from hour to hour: only ratios are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.bench import growth, micro, peers, traffic
from tpray.commands.load_generator import Generator, Load, Outcome, plot
from tpray.config import DtypeName, cache_dir

console = Console(width=130)
ENGINES = ("openvino-bf16", "openvino-fp32", "onnxruntime-fp32", "pipeline-fp32", "pipeline-bf16")
FRONTED = (("pipeline-fp32", "proxy"), ("openvino-bf16", "haproxy"), ("openvino-fp32", "haproxy"))
OURS = {
    "fp32 tp 2": ["--dtype", "float32", "--tp", "2"],
    "bf16 tp 2": ["--dtype", "bfloat16", "--tp", "2"],
    "int8 tp 2": ["--dtype", "int8", "--tp", "2"],
    "fp32 tp 1 x 2": ["--dtype", "float32", "--tp", "1", "--replicas", "2"],
    "bf16 tp 1 x 2": ["--dtype", "bfloat16", "--tp", "1", "--replicas", "2"],
    "int8 tp 1 x 2": ["--dtype", "int8", "--tp", "1", "--replicas", "2"],
}
DTYPES: dict[str, DtypeName] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


@dataclass
class Row:
    """One target: what was compared, the ratio that was measured, and whether it is good enough."""

    name: str
    target: str
    measured: float | None
    holds: Callable[[float], bool]
    unit: str = "x"

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.holds(self.measured) else "MISSED"


@dataclass
class Results:
    http: dict[str, list[Outcome]] = field(default_factory=dict)
    in_process: dict[str, dict[str, Any]] = field(default_factory=dict)
    micro: dict[str, Any] = field(default_factory=dict)
    per_token: dict[int, dict[str, float]] = field(default_factory=dict)
    clients: list[Outcome] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def measure(model: Path, short: bool) -> Results:
    results = Results()
    console.rule("parts of a step")
    over_wire, over_ray = micro.fan_out_us()
    results.micro = {"fan_out_us": {"wire": over_wire, "ray actors": over_ray}, "all_reduce_us": micro.all_reduce_us()}
    for name in ("fp32", "bf16"):
        dtype = getattr(torch, DTYPES[name])
        results.micro[f"gemm_{name}_gflops"] = {n: micro.gemm_ceiling(dtype, n) for n in (1, 2)}
    results.micro["loading_bytes"] = {tp: micro.loading_bytes(model, tp) for tp in (1, 2, 4)}
    console.print(results.micro)

    console.rule("in process")
    for engine in ENGINES if not short else ENGINES[:2]:
        with _skipping(results, engine):
            _note(results.in_process, engine, micro.engine_figures(peers.make(engine, model), short))
    for name in ("fp32", "bf16", "int8"):
        for tp, threads in ((2, 1), (1, 1)):
            with _skipping(results, f"tpray {name} tp {tp}"):
                figures = micro.group_figures(model, tp, DTYPES[name], threads, short)
                _note(results.in_process, f"tpray {name} tp {tp}", figures)

    console.rule("over HTTP")
    loads = [Load(concurrency=n) for n in ((1, 32) if short else (1, 8, 32, 128))]
    for engine, front in FRONTED if not short else FRONTED[:2]:
        with _skipping(results, f"{engine} behind Serve"):
            command = [sys.executable, "-m", "tests.bench.peers", engine, str(model)]
            results.http[f"{engine}, {front}"] = _over_http(command, [front], loads, short)
    for name, flags in OURS.items() if not short else list(OURS.items())[:3]:
        with _skipping(results, f"tpray {name}"):
            command = [sys.executable, "-m", "tpray", "serve", str(model), *flags]
            results.http[f"tpray {name}"] = _over_http(command, None, loads, short)
    if not short:
        measure_growth(model, results)
    return results


def measure_growth(model: Path, results: Results, short: bool = False) -> None:
    """Fill in how cost grows with length, batch, degree and clients."""
    console.rule("growth")
    for tp in growth.DEGREES:
        results.per_token[tp] = growth.micros_per_token(model, tp, short)
        console.print(f"tp {tp}, µs a token:", {k: round(v) for k, v in results.per_token[tp].items()})
    command = [sys.executable, "-m", "tpray", "serve", "--tp", "2", "--max-concurrent-requests", "4096"]
    results.clients = _over_http(command, None, [Load(concurrency=n) for n in growth.CLIENTS], short=True)


@contextlib.contextmanager
def _skipping(results: Results, name: str) -> Iterator[None]:
    """A peer that is not installed, or does not come up, is named and left out."""
    try:
        package = peers.missing(name.partition(" ")[0]) if name.partition("-")[0] in peers.NEEDS else None
        if package is not None:
            raise RuntimeError(f"{package} is not installed: pip install 'tpray[bench]'")
        yield
    except Exception as e:  # noqa: BLE001  # whatever keeps one of them from running must not end the others
        reason = f"{name}: skipped, {str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__}"
        results.skipped.append(reason)
        console.print(reason)


def _note(table: dict[str, dict[str, Any]], name: str, figures: dict[str, Any]) -> None:
    table[name] = figures
    short = {key: round(value, 1) for key, value in figures.items() if isinstance(value, float)}
    console.print(f"{name}: {short}", highlight=False)


def _over_http(command: list[str], extra: list[str] | None, loads: list[Load], short: bool) -> list[Outcome]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    arguments = [*command, str(port), *extra] if extra is not None else [*command, "--port", str(port)]
    server = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout is not None
        said: list[str] = []
        for line in server.stdout:
            said.append(line)
            if "Ready" in line:
                break
        else:
            raise RuntimeError("".join(said[-5:]) or "it ended at once")
        seconds = 4.0 if short else 10.0
        generator = Generator(f"http://127.0.0.1:{port}", [list(pair) for pair in traffic.pairs(512)], 60.0)
        asyncio.run(generator.run([loads[-1]], seconds / 2, 0.0, 10**6))  # warms the server up
        outcomes: list[Outcome] = asyncio.run(generator.run(loads, seconds, 0.0, 10**6))
        if not any(o.per_second for o in outcomes):
            raise RuntimeError(f"every request failed: {dict(outcomes[0].errors)}")
        if not short:
            per_second = outcomes[[o.load.concurrency for o in outcomes].index(32)].per_second
            open_loops = [Load(rate=round(per_second * share, 1)) for share in (0.5, 0.8, 1.2)]
            outcomes += asyncio.run(generator.run(open_loops, seconds, 0.0, 10**6))
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    for o in outcomes:
        console.print(
            f"{' '.join(command[3:5])} {o.load.name}: {o.per_second:.1f} requests/s, p50 {o.percentile(50):.1f} ms, "
            f"p99 {o.percentile(99):.1f} ms, errors {dict(o.errors)}",
            highlight=False,
        )
    return outcomes


def targets(results: Results) -> list[Row]:
    """The table: every promise about speed, as a ratio of two figures of this run."""

    def http(name: str, clients: int) -> Outcome | None:
        found = results.http.get(name)
        return next((o for o in found or [] if o.load.concurrency == clients), None)

    def best(dtype: str, clients: int) -> Outcome | None:
        runs = [http(f"tpray {dtype} {layout}", clients) for layout in ("tp 2", "tp 1 x 2")]
        present = [run for run in runs if run is not None]
        return max(present, key=lambda run: run.per_second) if present else None

    def rate(one: Outcome | None, other: Outcome | None) -> float | None:
        return one.per_second / other.per_second if one and other and other.per_second else None

    def inside(name: str, key: str) -> float | None:
        value = results.in_process.get(name, {}).get(key)
        return None if value is None else float(value)

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one is not None and other else None

    def at_least(x: float) -> Callable[[float], bool]:
        return lambda measured: measured >= x

    def at_most(x: float) -> Callable[[float], bool]:
        return lambda measured: measured <= x

    pipeline, openvino = http("pipeline-fp32, proxy", 32), http("openvino-bf16, haproxy", 32)
    rows = [
        Row(f"HTTP requests/s at 32 clients over pipeline fp32 on Serve: {name}", f">= {x}x",
            rate(best(name, 32), pipeline), at_least(x))
        for name, x in (("fp32", 3), ("bf16", 6), ("int8", 9))
    ]  # fmt: skip
    rows.append(Row("the same over OpenVINO bf16 on Serve with HAProxy: bf16", ">= 1.2x",
                    rate(best("bf16", 32), openvino), at_least(1.2)))  # fmt: skip
    ours, theirs = http("tpray bf16 tp 2", 1), http("openvino-bf16, haproxy", 1)
    rows.append(Row("p50 at 1 client over the same: bf16 tp 2", "<= 0.9x",
                    ratio(ours.percentile(50) if ours else None, theirs.percentile(50) if theirs else None),
                    at_most(0.9)))  # fmt: skip
    for name in ("fp32", "bf16"):
        measured = ratio(inside(f"tpray {name} tp 2", "tokens_per_s"), inside(f"openvino-{name}", "tokens_per_s"))
        rows.append(Row(f"in-process tokens/s over OpenVINO, same batches: {name} tp 2", ">= 1.0x", measured,
                        at_least(1.0)))  # fmt: skip
    mean = sum(traffic.lengths(512)) / 512
    served = http("tpray bf16 tp 2", 32)
    rows.append(Row("tokens/s over HTTP at 32 clients over the same group in process: bf16", ">= 0.85x",
                    ratio(served.per_second * mean if served else None, inside("tpray bf16 tp 2", "tokens_per_s")),
                    at_least(0.85)))  # fmt: skip
    for name in ("fp32", "bf16"):
        measured = ratio(
            inside(f"tpray {name} tp 2", "latency_1_128_ms"), inside(f"tpray {name} tp 1", "latency_1_128_ms")
        )
        rows.append(Row(f"latency of [1, 128], tp 2 on two cores over tp 1 on one: {name}", "<= 0.54x", measured,
                        at_most(0.54)))  # fmt: skip
    fan_out = results.micro["fan_out_us"]
    rows.append(Row("fan-out and gather of an empty step over plain actor calls", "<= 0.1x",
                    fan_out["wire"] / fan_out["ray actors"], at_most(0.1)))  # fmt: skip
    reduce = results.micro["all_reduce_us"]
    for i, name in enumerate(("fp32", "bf16")):
        rows.append(Row(f"all-reduce of [128, 768] over gloo: {name}", "<= 0.1x",
                        reduce["shared"][i] / reduce["gloo"][i], at_most(0.1)))  # fmt: skip
    work = traffic.flops([128] * 8)
    for name, share in (("fp32", 85), ("bf16", 80)):
        milliseconds = inside(f"tpray {name} tp 2", "latency_8_128_ms")
        speed = work / milliseconds / 1e6 if milliseconds else None
        measured = ratio(speed, results.micro[f"gemm_{name}_gflops"][2])
        rows.append(Row(f"share of the GEMM ceiling at [8, 128], tp 2: {name}", f">= {share} %",
                        None if measured is None else 100 * measured, at_least(share), " %"))  # fmt: skip
    idle = inside("tpray bf16 tp 2", "idle_cpu_share")
    rows.append(Row("CPU of a loaded group that waits, of a core", "< 1 %", None if idle is None else 100 * idle,
                    lambda measured: measured < 1, " %"))  # fmt: skip
    rows.append(_memory(results, at_most(1.0)))
    loading = results.micro["loading_bytes"][2]
    rows.append(Row("peak memory of a rank while it loads at tp 2 over its shard and one tensor", "<= 1.05x",
                    loading["peak"] / (loading["shard"] + loading["largest"]), at_most(1.05)))  # fmt: skip
    return rows


def _memory(results: Results, holds: Callable[[float], bool]) -> Row:
    one, two = (results.in_process.get(f"tpray fp32 tp {tp}") for tp in (1, 2))
    measured = None
    if one and two:
        bound = one["sharded_bytes"][0] / 2 + one["replicated_bytes"][0]
        measured = max(s + r for s, r in zip(two["sharded_bytes"], two["replicated_bytes"], strict=True)) / bound
    return Row("a rank's weights at tp 2 over 1/2 of the sharded and all of the replicated ones", "<= 1.01x",
               measured, lambda x: holds(x / 1.01))  # fmt: skip


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {}
    for package in ("ray", "torch", "transformers", "openvino", "onnxruntime", "tpray"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"cpu": named, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def _store_growth(results: Results, folder: Path) -> None:
    clients = {o.load.concurrency: o.summary() for o in results.clients}
    (folder / "growth.json").write_text(
        json.dumps({"per_token": results.per_token, "clients": clients}, indent=2) + "\n"
    )
    with contextlib.suppress(ImportError):
        growth.plot(results.per_token, results.clients, folder / "growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a quick look in under five minutes: fewer peers and runs")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for table, JSON and plots")
    parser.add_argument("--growth", action="store_true", help="only how cost grows with length, batch and clients")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.growth:
        results = Results()
        measure_growth(traffic.checkpoint(cache_dir() / "bench"), results, options.short)
        _store_growth(results, options.out)
        return
    started = time.monotonic()
    results = measure(traffic.checkpoint(cache_dir() / "bench"), options.short)
    rows = targets(results)
    table = Table("target", "wanted", "measured", "verdict", title="tpray against its peers, one run")
    for row in rows:
        value = "-" if row.measured is None else f"{row.measured:.2f}{row.unit}"
        table.add_row(row.name, row.target, value, row.verdict)
    console.print(table)
    described = machine()
    console.print(described, *results.skipped, sep="\n")
    console.print(f"took {time.monotonic() - started:.0f} s")
    stored = {
        "machine": described,
        "short": options.short,
        "targets": [{"name": r.name, "wanted": r.target, "measured": r.measured, "verdict": r.verdict} for r in rows],
        "http": {name: [o.summary() for o in outcomes] for name, outcomes in results.http.items()},
        "in_process": results.in_process,
        "micro": results.micro,
        "skipped": results.skipped,
    }
    if results.per_token:
        _store_growth(results, options.out)
    (options.out / "results.json").write_text(json.dumps(stored, indent=2) + "\n")
    markdown = ["| target | wanted | measured | verdict |", "|---|---|---|---|"]
    for row in rows:
        value = "-" if row.measured is None else f"{row.measured:.2f}{row.unit}"
        markdown.append(f"| {row.name} | {row.target} | {value} | {row.verdict} |")
    (options.out / "table.md").write_text("\n".join(markdown) + "\n")
    for name, outcomes in results.http.items():
        with contextlib.suppress(Exception):
            plot(outcomes, options.out / f"{name.replace(' ', '-').replace(',', '')}.png", name)


if __name__ == "__main__":
    main()
