"""A load generator for any server that speaks TEI's dialect: ``tpray bench URL``.

Closed loop: N clients, each sends its next request when it has its answer; that finds the capacity. Open loop:
requests arrive at a rate, whatever the server does, as independent users would (Poisson); that shows the latency at a
load, without the coordinated omission of a closed loop (https://www.scylladb.com/2021/04/22/on-coordinated-omission/).
Every run is bounded in time and in requests, and a request that fails is counted by its reason.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import numpy as np

from tpray.errors import ConfigError, InputError, TprayError
from tpray.installation import install_command

OUTSTANDING = 2000
"""Most requests that an open loop has on their way at once; more are counted as an error of their own."""

_COMMON = """the of and to in is was for on that with as by at from his it an are were which this be has had also or
first not but one new after two their who its been time other when people all more would about year company city house
market water school work team price food plan game book car train road river child friend story music"""


@dataclass(frozen=True)
class Load:
    """One run: ``concurrency`` clients (closed loop), or ``rate`` requests a second (open loop)."""

    concurrency: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.concurrency} clients" if self.concurrency else f"{self.rate:g}/s"

    @property
    def label(self) -> str:
        """What stands beside its point in a plot."""
        return str(self.concurrency) if self.concurrency else self.name


@dataclass
class Outcome:
    """What a run found. Latencies in milliseconds, of the requests that were answered."""

    load: Load
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def percentile(self, share: float) -> float:
        """The latency that ``share`` percent of the answers did not exceed; NaN when there was none."""
        return float(np.percentile(self.latencies_ms, share)) if self.latencies_ms else float("nan")

    @property
    def per_second(self) -> float:
        return len(self.latencies_ms) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self) -> dict[str, Any]:
        """The run as a JSON object; a percentile of nothing is null."""
        percentiles = {f"p{p:g}_ms": self.percentile(p) for p in (50, 90, 99, 100)}
        return {
            **asdict(self.load),
            "seconds": round(self.seconds, 3),
            "answered": len(self.latencies_ms),
            "requests_per_s": round(self.per_second, 2),
            "tokens_per_s": round(self.tokens_per_second, 1),
            **{name: None if np.isnan(value) else round(value, 3) for name, value in percentiles.items()},
            "errors": dict(self.errors),
        }


def generated(mean: float, deviation: float, shortest: int, longest: int, pairs: bool, seed: int = 0) -> list[Any]:
    """512 texts, or pairs, of common words; the number of words of each is drawn from a clipped normal distribution."""
    rng, vocabulary = random.Random(seed), _COMMON.split()

    def text(words: int) -> str:
        return " ".join(rng.choices(vocabulary, k=max(1, words)))

    lengths = [min(longest, max(shortest, round(rng.gauss(mean, deviation)))) for _ in range(512)]
    return [[text(n // 2), text(n - n // 2)] if pairs else text(n) for n in lengths]


def read_texts(path: Path) -> list[Any]:
    """One input a line: plain text, or JSON with ``text`` and perhaps ``text_pair``.

    Raises:
        ConfigError: the file cannot be read, or has no line.
        InputError: a line that starts like JSON is none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {path}: {e}") from e
    if not lines:
        raise ConfigError(f"{path} has no text in it")
    inputs: list[Any] = []
    for number, line in enumerate(lines, start=1):
        if not line.startswith("{"):
            inputs.append(line)
            continue
        try:
            record = json.loads(line)
            inputs.append([record["text"], record["text_pair"]] if "text_pair" in record else record["text"])
        except (ValueError, KeyError) as e:
            raise InputError(f'{path}, line {number}: not an object with "text": {e}') from e
    return inputs


class Generator:
    """Sends ``inputs`` in turn, one a request, to ``url``/predict.

    Args:
        url: the server, ``http://host:port``.
        inputs: texts, or pairs as lists of two.
        timeout_s: a request without an answer by then is an error.
        tick: called with the run so far about five times a second.
        headers: of every request, such as its key.
    """

    def __init__(
        self,
        url: str,
        inputs: Sequence[Any],
        timeout_s: float = 30.0,
        tick: Callable[[Outcome], None] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._url = f"{url.rstrip('/')}/predict"
        self._bodies = [json.dumps({"inputs": item, "truncate": True}).encode() for item in inputs]
        self._timeout_s, self._tick = timeout_s, tick
        self._headers = {"content-type": "application/json", **headers}

    async def run(self, loads: Sequence[Load], seconds: float, warm_up_s: float, limit: int) -> list[Outcome]:
        """Run every load for ``seconds``, after ``warm_up_s`` of the first one, ``limit`` requests at most each.

        Raises:
            TprayError: the server does not answer at all.
        """
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers) as self._session:
            await self._probe()
            if warm_up_s:
                await self._run(loads[0], warm_up_s, limit)
            return [await self._run(load, seconds, limit) for load in loads]

    async def _probe(self) -> None:
        try:
            async with self._session.post(self._url, data=self._bodies[0]) as answer:
                await answer.read()
        except (TimeoutError, aiohttp.ClientError, ValueError) as e:
            raise TprayError(f"no server answers at {self._url}: {e or type(e).__name__}") from e

    async def _run(self, load: Load, seconds: float, limit: int) -> Outcome:
        outcome = Outcome(load)
        bodies = itertools.islice(itertools.cycle(self._bodies), limit)
        ticker = asyncio.ensure_future(self._ticking(outcome))
        started = time.perf_counter()
        try:
            if load.concurrency:
                clients = (self._client(bodies, started + seconds, outcome) for _ in range(load.concurrency))
                await asyncio.gather(*clients)
            else:
                await self._arrivals(bodies, started, load.rate, seconds, outcome)
        finally:
            ticker.cancel()
        outcome.seconds = time.perf_counter() - started
        return outcome

    async def _client(self, bodies: Iterator[bytes], until: float, outcome: Outcome) -> None:
        while time.perf_counter() < until and (body := next(bodies, None)) is not None:
            if not await self._request(body, time.perf_counter(), outcome):
                await asyncio.sleep(0.05)  # a server that refuses at once must not make a client spin

    async def _arrivals(
        self, bodies: Iterator[bytes], started: float, rate: float, seconds: float, outcome: Outcome
    ) -> None:
        rng = random.Random(1)
        due, running = started, set[asyncio.Future[bool]]()
        while (due := due + rng.expovariate(rate)) < started + seconds and (body := next(bodies, None)) is not None:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(running) >= OUTSTANDING:
                outcome.errors[f"not sent: {OUTSTANDING} were on their way"] += 1
                continue
            # Timed from when it was due: a late generator must not make the server look fast.
            task = asyncio.ensure_future(self._request(body, due, outcome))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _request(self, body: bytes, since: float, outcome: Outcome) -> bool:
        try:
            async with self._session.post(self._url, data=body) as answer:
                await answer.read()
        except TimeoutError:
            outcome.errors[f"no answer within {self._timeout_s:g} s"] += 1
            return False
        except aiohttp.ClientError as e:
            outcome.errors[type(e).__name__] += 1
            return False
        if answer.status != 200:
            outcome.errors[f"HTTP {answer.status}"] += 1
            return False
        outcome.latencies_ms.append((time.perf_counter() - since) * 1e3)
        outcome.tokens += int(answer.headers.get("x-compute-tokens", 0))
        return True

    async def _ticking(self, outcome: Outcome) -> None:
        started = time.perf_counter()
        while True:
            await asyncio.sleep(0.2)
            outcome.seconds = time.perf_counter() - started
            if self._tick is not None:
                self._tick(outcome)


@dataclass
class Curve:
    """One line of a plot. points: requests a second, a latency in milliseconds, and what stands beside the point."""

    name: str
    points: list[tuple[float, float, str]]
    style: str = "-o"


def curves(outcomes: Sequence[Outcome]) -> list[Curve]:
    """The median and the 99th percentile of closed and of open loops, as far as there are any."""
    found = []
    for kind, style in (("clients", "o"), ("rate", "s")):
        runs = [o for o in outcomes if o.latencies_ms and bool(o.load.concurrency) is (kind == "clients")]
        runs.sort(key=lambda o: o.per_second)
        for share, line in ((50, "-"), (99, "--")):
            points = [(o.per_second, o.percentile(share), o.load.label) for o in runs]
            name = f"{'closed' if kind == 'clients' else 'open'} loop, p{share}"
            if points:
                found.append(Curve(name, points, line + style))
    return found


def plot(lines: Sequence[Curve], path: Path, title: str, log: bool = False) -> None:
    """Draw latency against throughput as a PNG or SVG, as ``path`` is named; log: the latency on such a scale.

    Raises:
        ConfigError: see `check_plots`.
    """
    check_plots(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        rates, latencies = [point[0] for point in line.points], [point[1] for point in line.points]
        (drawn,) = axes.plot(rates, latencies, line.style, label=line.name, markersize=4)
        for rate, latency, label in line.points:
            place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8, "color": drawn.get_color()}
            axes.annotate(label, (rate, latency), **place)
    axes.set(xlabel="requests per second", ylabel="latency, ms", title=title, xlim=(0, None))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", fontsize=8)  # where it hides no point
    figure.savefig(path, dpi=120)


def check_plots(path: Path) -> None:
    """Asked before the load, not after it.

    Raises:
        ConfigError: matplotlib is not installed, or ``path`` names no PNG or SVG.
    """
    from importlib.util import find_spec

    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {path}: give a file whose name ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise ConfigError(f"a plot needs matplotlib: {install_command('bench')}")
