"""The parts of the side-by-side; each can be run by itself (``--only``)."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.bench import groups, growth, micro, mixed, peers, rerank, servers, traffic
from tests.bench.servers import Point
from tpray.config import DEMO_DIR, DtypeName, cache_dir
from tpray.platforms.cores import core_count

SHORT_NAMES: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16"}
DEMO_PAIR = [
    "The company HuggingFace is based in New York City",
    "HuggingFace's headquarters are situated in Manhattan",
]
TEI = "text-embeddings-router"
SMALL = ("demo", "MiniLM")
"""What the names of the servers of small models begin with."""


def layouts() -> dict[str, list[str]]:
    """How the groups of a server share this machine's cores, and the flags that say so."""
    half = str(max(1, core_count() // 2))
    return {
        "tp 1": ["--tp", "1"],
        "tp 2": ["--tp", "2"],
        "2 x tp 1": ["--tp", "1", "--replicas", "2", "--cores-per-rank", half],
    }


@dataclass
class Run:
    """One run: what is measured, and what was found so far.

    values: single figures by their names. http: what each server did, by its number of clients.
    skipped: what was not measured, and why.
    """

    model: Path
    dtypes: Sequence[DtypeName]
    short: bool
    out: Path
    values: dict[str, float] = field(default_factory=dict)
    http: dict[str, dict[int, Point]] = field(default_factory=dict)
    mixes: list[mixed.Mix] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of one run of a load."""
        return 2.0 if self.short else 3.0

    @property
    def rounds(self) -> int:
        return 1 if self.short else 3

    def section(self, name: str) -> None:
        """Measure one of `SECTIONS`."""
        started = time.monotonic()
        print(f"== {name}", flush=True)
        with self.part(name):
            SECTIONS[name](self)
        print(f"   took {time.monotonic() - started:.0f} s", flush=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is not installed, or does not come up, is named and left out; the rest is measured all the same."""
        try:
            yield
        except Exception as e:  # noqa: BLE001  # whatever keeps one of them from running must not end the others
            said = str(e).strip().splitlines()
            self.skipped.append(f"{name}: {said[-1] if said else type(e).__name__}")
            print(f"   not measured: {self.skipped[-1]}", flush=True)

    def note(self, prefix: str, found: dict[str, float]) -> None:
        """Keep figures, and show them."""
        for name, value in found.items():
            self.values[f"{prefix}: {name}"] = value
        print(f"   {prefix}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()), flush=True)

    def serve(self, name: str, command: list[str], inputs: Sequence[Any], clients: Sequence[int]) -> None:
        """Start a server, load it, and keep what it did."""
        with self.part(name), servers.server(command) as url:
            self.http[name] = servers.load(url, inputs, clients, self.seconds, {1: self.rounds, 32: self.rounds})
            for point in self.http[name].values():
                print(
                    f"   {name}, {point.clients} clients: p50 {point.p50_ms:.1f} ms, p99 {point.p99_ms:.1f} ms, "
                    f"{point.per_second:.1f} requests/s",
                    flush=True,
                )


def ours(model: Path | None, dtype: str, layout: str) -> list[str]:
    """The command of a server of tpray; nobody is turned away for having to wait."""
    named = [] if model is None else [str(model)]
    flags = [*layouts()[layout], "--dtype", dtype, "--max-queue-s", "0", "--port", "PORT"]
    return [sys.executable, "-m", "tpray", "serve", *named, *flags]


def peer(engine: str, model: Path, front: str) -> list[str]:
    """The command of another engine behind Serve.

    Raises:
        RuntimeError: it is not installed.
    """
    package = peers.missing(engine)
    if package is not None:
        raise RuntimeError(f"{package} is not installed: pip install 'tpray[bench]'")
    return [sys.executable, "-m", "tests.bench.peers", engine, str(model), "PORT", front]


def over_http(run: Run) -> None:
    """Sentence pairs as long as MRPC's to a model of BERT-base's shape."""
    pairs, clients = [list(pair) for pair in traffic.pairs(512)], (1, 32) if run.short else (1, 8, 32, 128)
    for dtype in run.dtypes:
        short = SHORT_NAMES[dtype]
        run.serve(f"tpray tp 1 {short}", ours(run.model, dtype, "tp 1"), pairs, clients)
        with run.part(f"OpenVINO {short}"):
            run.serve(f"OpenVINO {short}", peer(f"openvino-{short}", run.model, "haproxy"), pairs, clients)
        run.serve(f"tpray tp 2 {short}", ours(run.model, dtype, "tp 2"), pairs, clients)
        run.serve(f"tpray 2 x tp 1 {short}", ours(run.model, dtype, "2 x tp 1"), pairs, clients)
    run.serve("transformers fp32", peer("pipeline-fp32", run.model, "proxy"), pairs, clients)
    with run.part("TEI fp32"):
        if shutil.which(TEI) is None:
            raise RuntimeError(f"there is no {TEI} on the PATH; it comes with huggingface/text-embeddings-inference")
        flags = ["--model-id", str(run.model), "--dtype", "float32", "--hostname", "127.0.0.1", "--port", "PORT"]
        run.serve("TEI fp32", [TEI, *flags], pairs, clients)


def in_process(run: Run) -> None:
    """Groups of tpray in this process: their steps, their ranks' memory and idle CPU; the bare program beside them."""
    cores = core_count()
    for dtype in run.dtypes:
        for name, tp, width in (("tp 1", 1, cores), ("tp 2", 2, 1), ("one core", 1, 1)):
            with run.part(f"{name} {dtype}"):
                idle = dtype == run.dtypes[0] and name != "one core"
                run.note(f"{name} {SHORT_NAMES[dtype]}", groups.figures(run.model, tp, dtype, width, idle))
    with run.part("the demo's ranks"):
        run.note("demo tp 1 fp32", groups.memory(None, 1, "float32", cores))


def engines(run: Run) -> None:
    """The other engines in process, on all cores."""
    names = [f"{name}-{SHORT_NAMES[dtype]}" for dtype in run.dtypes for name in ("openvino", "pipeline")]
    for engine in [*names, "onnxruntime-fp32"] if not run.short else names:
        with run.part(engine):
            if (package := peers.missing(engine)) is not None:
                raise RuntimeError(f"{package} is not installed: pip install 'tpray[bench]'")
            run.note(engine, groups.engine_figures(peers.make(engine, run.model)))


def small_models(run: Run) -> None:
    """The demo, and the shape of a MiniLM of 6 layers: what surrounds the arithmetic counts there."""
    dtype = run.dtypes[-1]
    short = SHORT_NAMES[dtype]
    mini = traffic.checkpoint(cache_dir() / "bench", traffic.MINI_LM)
    pairs = [list(pair) for pair in traffic.pairs(512)]
    models = ((DEMO_DIR, None, [DEMO_PAIR]), (mini, mini, pairs))
    for name, (model, served, inputs) in zip(SMALL, models, strict=True):
        run.note(f"{name}, transformers fp32", {"p50 ms": _stock_p50_ms(model, inputs)})
        run.serve(f"{name}, tpray tp 1 {short}", ours(served, dtype, "tp 1"), inputs, (1, 32))
        run.serve(f"{name}, tpray tp 2 {short}", ours(served, dtype, "tp 2"), inputs, (1, 32))
        with run.part(f"{name}, OpenVINO {short}"):
            run.serve(f"{name}, OpenVINO {short}", peer(f"openvino-{short}", model, "haproxy"), inputs, (1, 32))


def _stock_p50_ms(model: Path, inputs: Sequence[Any]) -> float:
    """Milliseconds that transformers takes from a pair to its scores, in float32; on one core or all, the faster."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, stock = AutoTokenizer.from_pretrained(model), AutoModelForSequenceClassification.from_pretrained(model)
    stock.eval()
    before, found = torch.get_num_threads(), []
    for threads in {1, core_count()}:
        torch.set_num_threads(threads)
        times = []
        with torch.inference_mode():
            for number in range(110):
                pair = inputs[number % len(inputs)]
                started = time.perf_counter()
                stock(**tokenizer(*pair, return_tensors="pt")).logits.softmax(-1).tolist()
                times.append((time.perf_counter() - started) * 1e3)
        found.append(statistics.median(times[10:]))
    torch.set_num_threads(before)
    return min(found)


def start(run: Run) -> None:
    """From the launch of `tpray serve` of the demo to its first answer, beside a bare Serve application."""
    from tests.bench import starts

    found = starts.measure(run.rounds)
    run.note("start", {f"{kind} s": statistics.median(seconds) for kind, seconds in found.items()})


def door(run: Run) -> None:
    """CPU of the replica for a request, beside a bare Serve application that answers a constant."""
    from tests.bench import door as costs  # type: ignore[attr-defined,unused-ignore]

    for side in ("bare Serve", "tpray"):
        with costs.served(costs.SIDES[side]) as (url, replica):
            for cost in costs.costs(url, replica, run.seconds, run.rounds):
                run.note(f"door, {side}, {cost.clients} clients", {"cpu ms": cost.cpu_ms, "p50 ms": cost.p50_ms})


def mixed_rows(run: Run) -> None:
    """Short rows beside long ones."""
    dtype = run.dtypes[-1]
    with servers.server(ours(run.model, dtype, "tp 1")) as url:
        run.mixes = mixed.measure(url, 2 * run.seconds, run.rounds)
    for mix in run.mixes:
        run.note(
            f"16 tokens, {mix.name}",
            {"p99 ms alone": mix.alone_p99_ms, "p99 ms beside 512": mix.mixed_p99_ms,
             "16s a second": mix.short_per_s, "512s a second": mix.long_per_s},
        )  # fmt: skip


def reranking(run: Run) -> None:
    """A hundred documents for one query, to the shapes of BERT-base and of a MiniLM of 6 layers."""
    mini = traffic.checkpoint(cache_dir() / "bench", traffic.MINI_LM)
    for model, named in ((run.model, "rerank"), (mini, "rerank, MiniLM")):
        for dtype in run.dtypes:
            short = SHORT_NAMES[dtype]
            with run.part(f"sentence-transformers {short}"):
                run.note(f"{named}, CrossEncoder {short}", rerank.cross_encoder(model, dtype, run.rounds))
            with run.part(f"{named} {short}"), servers.server(ours(model, dtype, "tp 1")) as url:
                run.note(f"{named}, tpray tp 1 {short}", rerank.over_http(url, run.rounds))


def parts(run: Run) -> None:
    """Of a step: the wire, the all-reduce, matrix products; what a rank needs while it loads."""
    cores, (over_wire, over_ray) = core_count(), micro.fan_out_us()
    run.note("fan-out", {"wire us": over_wire, "Ray actors us": over_ray})
    for kind, by_dtype in micro.all_reduce_us().items():
        run.note(f"all-reduce, {kind}", {f"{dtype} us": us for dtype, us in by_dtype.items()})
    for dtype in run.dtypes:
        found = {f"{n} cores GFLOP/s": micro.gemm_ceiling(getattr(torch, dtype), n) for n in sorted({1, 2, cores})}
        run.note(f"GEMM {SHORT_NAMES[dtype]}", found)
    run.note("loading at tp 2", {f"{name} bytes": float(n) for name, n in micro.loading_bytes(run.model, 2).items()})


def cost_growth(run: Run) -> None:
    """How cost grows with length, batch, degree and clients; two PNGs and a JSON file."""
    growth.measure(run.model, run.out, run.short)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "start": start,
    "door": door,
    "small": small_models,
    "groups": in_process,
    "engines": engines,
    "parts": parts,
    "mixed": mixed_rows,
    "rerank": reranking,
    "http": over_http,
    "growth": cost_growth,
}
"""By their names for ``--only``; the last only by its name."""
