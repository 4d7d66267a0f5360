"""What a run says at its end, in the README's own form, and its picture."""

from __future__ import annotations

import contextlib
import platform
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench import traffic
from tests.bench.figures import HEADINGS, Figure, Side, largest, markdown, smallest
from tests.bench.groups import SHAPES
from tests.bench.sections import SHORT_NAMES, SMALL, Run
from tpray.commands.load_generator import Curve
from tpray.commands.load_generator import plot as draw
from tpray.platforms.cores import core_count
from tpray.platforms.cpu import native_dtypes

LAYOUTS = ("tp 1", "tp 2", "2 x tp 1")


def done_when(run: Run) -> list[Figure]:
    """The figures with targets."""
    value, http, dtypes = partial(_value, run), partial(_http, run), [SHORT_NAMES[dtype] for dtype in run.dtypes]
    last = dtypes[-1]
    rows = [
        Figure(
            f"p50 at 1 client, 53 tokens, over OpenVINO's behind Serve with HAProxy, {dtype}", 0.9,
            smallest([http(f"tpray {layout} {dtype}", 1, "p50_ms", layout) for layout in LAYOUTS[:2]]),
            http(f"OpenVINO {dtype}", 1, "p50_ms"), "ms",
        )
        for dtype in dtypes
    ] + [
        Figure(
            f"requests/s at 32 clients over the same, {dtype}", 1.2,
            largest([http(f"tpray {layout} {dtype}", 32, "per_second", layout) for layout in LAYOUTS]),
            http(f"OpenVINO {dtype}", 32, "per_second"), "/s", at_least=True,
        )
        for dtype in dtypes
    ] + [
        Figure(
            f"the program in its rank over the same bare in a process, tp 1, {shape}, {dtype}", 1.05,
            value(f"tp 1 {dtype}: in its rank {shape} ms"), value(f"tp 1 {dtype}: bare {shape} ms"), "ms",
        )
        for dtype in dtypes for shape in ("[1, 53]", "[8, 128]")
    ] + [
        Figure(
            f"demo over HTTP, 1 client, p50, over transformers in process, {last}", 1.3,
            smallest([http(f"demo, tpray {layout} {last}", 1, "p50_ms", layout) for layout in LAYOUTS[:2]]),
            value("demo, transformers fp32: p50 ms", "fp32"), "ms",
        )
    ] + [
        Figure(
            f"CPU of the replica per request over a bare Serve constant's, {clients} clients", 1.5,
            value(f"door, tpray, {clients} clients: cpu ms"),
            value(f"door, bare Serve, {clients} clients: cpu ms"), "ms",
        )
        for clients in (1, 32)
    ] + [
        Figure(
            "second start of the demo, tp 2, over bare Serve's start", 1.5,
            value("start: serve again s"), value("start: bare s"), "s",
        )
    ] + [
        Figure(
            f"tokens/s over HTTP at 32 clients over the same group in process, tp 2, {dtype}", 0.9,
            http(f"tpray tp 2 {dtype}", 32, "tokens_per_s"), value(f"tp 2 {dtype}: tokens/s"), "/s", at_least=True,
        )
        for dtype in dtypes
    ] + [
        Figure(
            f"[1, 128], tp 2 on two cores over tp 1 on one, {dtype}", 0.54,
            value(f"tp 2 {dtype}: [1, 128] ms"), value(f"one core {dtype}: [1, 128] ms"), "ms",
        )
        for dtype in dtypes
    ]  # fmt: skip
    rows += [_idle(run, tp, dtypes[0]) for tp in (1, 2)]
    rows += [
        Figure(
            f"16-token rows beside 512-token ones, {mix.name}: their p99 over that without the long ones", 2.0,
            Side(mix.mixed_p99_ms), Side(mix.alone_p99_ms), "ms",
        )
        for mix in run.mixes
    ]  # fmt: skip
    rows += [
        Figure(
            f"100 documents for one query, {against} over one request to tpray, {model}, {dtype}", 2.0,
            value(f"{named}, {other} {dtype}: {name}"), value(f"{named}, tpray tp 1 {dtype}: one request s"), "s",
            at_least=True,
        )
        for model, named in (("BERT-base", "rerank"), ("MiniLM", "rerank, MiniLM"))
        for dtype in dtypes
        for against, other, name in (
            ("sentence-transformers in process", "CrossEncoder", "predict s"),
            ("a request a pair, 32 at once,", "tpray tp 1", "a request a pair s"),
            ("a request a pair, one by one,", "tpray tp 1", "pairs one by one s"),
        )
    ]  # fmt: skip
    return rows + [_memory(run, kind, tp, dtype) for dtype in dtypes for tp in (1, 2) for kind in ("peak", "resident")]


def _idle(run: Run, tp: int, dtype: str) -> Figure:
    whole, rays = (_value(run, f"tp {tp} {dtype}: {whose} % of a core") for whose in ("idle", "Ray's idle"))
    net = Side(max(0.0, whole.value - rays.value), f"{whole.value:.2f} with Ray's") if whole and rays else None
    name = f"idle CPU of the ranks of a waiting group, tp {tp}, less that of Ray actors that do nothing"
    return Figure(name, 1.0, net, Side(1.0), "% of a core")


def _memory(run: Run, kind: str, tp: int, dtype: str) -> Figure:
    """Peak or resident size of a rank, less what a rank of the demo has, over the weights of its shard."""
    total, weights = (_value(run, f"tp {tp} {dtype}: {which} bytes") for which in (kind, "weight"))
    floor, net = _value(run, f"demo tp 1 fp32: {kind} bytes"), None
    if total and floor:
        net = Side((total.value - floor.value) / 1e6, f"{total.value / 1e6:.0f} less {floor.value / 1e6:.0f}")
    name = f"{kind} memory of a rank, less that of the demo's, over its weights, tp {tp}, {dtype}"
    return Figure(name, 1.15, net, Side(weights.value / 1e6) if weights else None, "MB")


def further(run: Run) -> list[Figure]:
    """Figures of earlier versions, which are to stay as good."""
    value, dtypes = partial(_value, run), [SHORT_NAMES[dtype] for dtype in run.dtypes]
    rows = [
        Figure(
            "fan-out and gather of an empty step over plain actor calls", 0.1,
            value("fan-out: wire us"), value("fan-out: Ray actors us"), "µs",
        )
    ]  # fmt: skip
    for dtype in dtypes:
        step = value(f"tp 2 {dtype}: [8, 128] ms")
        speed = Side(traffic.flops([128] * 8) / step.value / 1e6) if step else None
        rows += [
            Figure(
                f"all-reduce of [128, 768] over gloo's, {dtype}", 0.1,
                value(f"all-reduce, shared: {dtype} us"), value(f"all-reduce, gloo: {dtype} us"), "µs",
            ),
            Figure(
                f"in-process tokens/s over OpenVINO's, same batches, tp 2, {dtype}", 1.0,
                value(f"tp 2 {dtype}: tokens/s"), value(f"openvino-{dtype}: tokens/s"), "/s", at_least=True,
            ),
            Figure(
                f"share of oneDNN's GEMM speed at [8, 128], tp 2, {dtype}", {"fp32": 0.85, "bf16": 0.8}[dtype],
                speed, value(f"GEMM {dtype}: 2 cores GFLOP/s"), "GFLOP/s", at_least=True,
            ),
            Figure(
                f"requests/s at 32 clients over transformers fp32 on Serve, {dtype}", {"fp32": 3.0, "bf16": 6.0}[dtype],
                largest([_http(run, f"tpray {layout} {dtype}", 32, "per_second", layout) for layout in LAYOUTS]),
                _http(run, "transformers fp32", 32, "per_second"), "/s", at_least=True,
            ),
        ]  # fmt: skip
    peak, shard, tensor = (value(f"loading at tp 2: {name} bytes") for name in ("peak", "shard", "largest"))
    both = Side((shard.value + tensor.value) / 1e6) if shard and tensor else None
    name = "peak memory of reading a shard over the shard and its largest tensor, tp 2, fp32"
    return [*rows, Figure(name, 1.05, Side(peak.value / 1e6) if peak else None, both, "MB")]


def _value(run: Run, name: str, whose: str = "") -> Side | None:
    value = run.values.get(name)
    return None if value is None else Side(value, whose)


def _http(run: Run, server: str, clients: int, name: str, whose: str = "") -> Side | None:
    point = run.http.get(server, {}).get(clients)
    return None if point is None else Side(getattr(point, name), whose)


def text(run: Run, seconds: float) -> str:
    """The whole report, in Markdown; the table of targets is its end."""
    servers = [
        (
            name,
            *(
                f"{points[n].p50_ms:.3g} ms, {points[n].per_second:.3g}/s" if n in points else "-"
                for n in (1, 8, 32, 128)
            ),
        )
        for name, points in run.http.items()
    ]
    described = ", ".join(f"{name} {value}" for name, value in machine().items())
    about = f"One run of {seconds / 60:.0f} minutes, {time.strftime('%Y-%m-%d')}: {described}. Medians of {run.rounds}."
    parts = [about]
    if servers:
        parts.append(markdown(("over HTTP: p50 and requests/s", "1 client", "8", "32", "128"), servers))
    if inside := _in_process(run):
        parts.append(markdown(("in process", *(f"{list(shape)}, ms" for shape in SHAPES), "tokens/s"), inside))
    if others := [row.cells for row in further(run) if row.ratio is not None]:
        parts.append(markdown(HEADINGS, others))
    if run.skipped:
        parts.append("\n".join(["Not measured:", "", *(f"- {reason}" for reason in run.skipped)]) + "\n")
    parts.append(markdown(HEADINGS, [row.cells for row in done_when(run)]))
    return "\n".join(parts)


def _in_process(run: Run) -> list[tuple[str, ...]]:
    """Milliseconds by shape and tokens a second, of groups and engines in this process."""
    names = [name.removesuffix(": tokens/s") for name in run.values if name.endswith(": tokens/s")]
    columns = [*(f"{list(shape)} ms" for shape in SHAPES), "tokens/s"]
    return [
        (
            f"tpray {name}" if "tp " in name or "core" in name else name,
            *(f"{run.values[f'{name}: {c}']:.4g}" for c in columns),
        )
        for name in names
    ]


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    found: dict[str, Any] = {
        "cores": f"{core_count()} of {named} (multiply {', '.join(native_dtypes()[::-1])})",
        "Python": platform.python_version(),
    }
    for package in ("tpray", "ray", "torch", "transformers", "openvino", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def plot(run: Run, path: Path) -> None:
    """Draw p50 against requests/s, a line for each server, each point with its number of clients."""
    lines = [
        Curve(
            name,
            [(point.per_second, point.p50_ms, str(point.clients)) for point in points.values()],
            "-o" if name.startswith("tpray") else "--s",
        )
        for name, points in run.http.items()
        if not name.startswith(SMALL)
    ]
    draw(lines, path, "p50 by requests per second; beside each point its number of clients", log=True)
