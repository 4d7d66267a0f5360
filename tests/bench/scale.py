"""Many groups on many Ray nodes, on one machine: ``python -m tests.bench.scale SECTION``.

    grow     what the controller, HAProxy and Ray's control store cost at 1, 2, 4, 8 and 16 groups
    balance  HAProxy's ways to choose a group, under short and long texts in one stream
    route    the same for Serve's routers, which choose for handles
    lose     a node dies under load, then half of the nodes, which a zone would be
    store    how many requests a group's start makes to a store on S3

The groups' ranks sleep (`tests.bench.simulated`), unless ``--real``. A run ends by itself when it takes too long or
memory is short, and ends every process that it started. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.nodes import TOKEN_S, Bench, bounded, costs, free_bytes, say, wait_for, wait_until_behind
from tests.bench.stream import MIX, Outcome, keep_asking, medians, over_handle, over_http, summary


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


BALANCES = ("leastconn", "roundrobin", "random(2)")
"""HAProxy's ways to choose; the first is Serve's default."""
ROUTERS: dict[str, dict[str, Any]] = {
    "power of two": {},
    "tokens told": {
        "request_router_class": "tests.bench.simulated:Told", "request_routing_stats_period_s": 0.5,
    },
    "tokens sent": {"request_router_class": "tests.bench.simulated:FewestTokens"},
}  # fmt: skip
"""Ways to choose for a handle's requests: Serve's default, and by the tokens that wait, as two sources say."""


def balance(bench: Bench, groups: int, seconds: float, runs: int, rate: float, found: dict[str, Any]) -> None:
    """Percentiles of requests over HTTP by how HAProxy chooses, medians of ``runs``, into ``found``."""
    for way in BALANCES:
        bench.delete()
        bench.balance(way)
        bench.deploy(groups)
        wait_until_behind(bench, groups)
        assert f"balance {way}" in bench.haproxy_config.read_text(), "HAProxy was started with another"
        asyncio.run(over_http(bench.port, rate, 3, 99))
        made = [summary(asyncio.run(over_http(bench.port, rate, seconds, seed))) for seed in range(runs)]
        found[way] = medians(made)
        say(f"{way}: {found[way]}")


def route(bench: Bench, groups: int, seconds: float, runs: int, rate: float, found: dict[str, Any]) -> None:
    """The same by Serve's router, for what a handle sends."""
    for name, router in ROUTERS.items():
        bench.delete()
        handle = bench.deploy(groups, router)
        asyncio.run(over_handle(handle, rate, 3, 99))
        made = [summary(asyncio.run(over_handle(handle, rate, seconds, seed))) for seed in range(runs)]
        found[name] = medians(made)
        say(f"{name}: {found[name]}")


def _gone(bench: Bench, nodes: set[str]) -> bool:
    return nodes.isdisjoint(bench.replicas().values())


def lose(bench: Bench, groups: int, rate: float, found: dict[str, Any]) -> None:
    """A node dies under load, then half of those that are left; what clients see until all groups are back."""
    bench.delete()
    bench.deploy(groups)
    wait_until_behind(bench, groups)
    for name in ("node", "zone"):
        nodes = [bench.nodes[0][1]] if name == "node" else [node for zone, node in bench.nodes if zone == "b"]
        ids = {node.node_id for node in nodes}
        held = Counter(bench.replicas().values())
        outcomes: list[Outcome] = []
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
        bad = [each.due - killed for each in outcomes if each.what != "200"]
        found[name] = {
            "groups_lost": sum(held[i] for i in ids), "groups": groups, "noticed_s": round(noticed_s, 1),
            "running_again_s": round(back_s, 1), "behind_haproxy_again_s": round(listed_s, 1),
            "requests": len(outcomes), "outcomes": dict(Counter(each.what for each in outcomes)),
            "failures_between_s": [round(min(bad), 1), round(max(bad), 1)] if bad else None,
            "slowest_s": round(max(each.seconds for each in outcomes), 1),
        }  # fmt: skip
        say(json.dumps(found[name]))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what `grow` found: the start of all groups, and CPU and memory of what all groups share."""
    from matplotlib.figure import Figure

    shared = ("controller", "HAProxy", "HAProxy's manager", "control store")
    groups = [row["groups"] for row in rows]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    starts, cpu, memory = figure.subplots(1, 3)
    starts.plot(groups, [row["start_s"] for row in rows], "-o", markersize=4)
    starts.set_title("start of all groups, s", fontsize=9)
    for kind in shared:
        costs = [row["costs"].get(kind, {"cpu_percent": 0.0, "mib": 0.0}) for row in rows]
        cpu.plot(groups, [cost["cpu_percent"] for cost in costs], "-o", markersize=4, label=kind)
        memory.plot(groups, [cost["mib"] for cost in costs], "-o", markersize=4)
    cpu.set_title("CPU while nobody asks, % of a core", fontsize=9)
    memory.set_title("memory, MiB", fontsize=9)
    for axes in (starts, cpu, memory):
        axes.set(xlabel="groups", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(shared), fontsize=8)
    figure.savefig(path)


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("sections", nargs="+", choices=["grow", "balance", "route", "lose", "store"], metavar="SECTION")
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16, help="at most")
    parser.add_argument("--cpus", type=int, default=2, help="of each node, one for a group")
    parser.add_argument("--seconds", type=float, default=25, help="of each run under load, or of idleness")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--busy", type=float, default=0.7, help="share of what the groups can do")
    parser.add_argument("--limit", type=int, default=700, help="seconds, after which it ends")
    parser.add_argument("--real", action="store_true", help="ranks that compute, in processes of their own")
    parser.add_argument("--plot", type=Path, help="draw what `grow` finds, SVG or PNG")
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
        if options.plot is not None:
            plot(found["grow"], options.plot)


def on_nodes(bench: Bench, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run the sections that need nodes; what they found goes into ``found``."""
    mean = sum(tokens * share for tokens, share in MIX.items())
    rate = options.busy * options.groups / (mean * TOKEN_S)
    with bench.running():
        bench.add_nodes(options.nodes)
        say(f"{options.nodes} nodes, {free_bytes() / 2**30:.1f} GiB free")
        found["rate_per_s"] = round(rate, 1)
        for section in options.sections:
            found[section] = {}
            try:
                if section == "grow":
                    found[section] = grow(bench, [n for n in (1, 2, 4, 8, 16) if n <= options.groups], options.seconds)
                elif section in ("balance", "route"):
                    way = balance if section == "balance" else route
                    way(bench, options.groups, options.seconds, options.runs, rate, found[section])
                elif section == "lose":
                    lose(bench, options.groups, rate, found[section])
            except Exception:  # noqa: BLE001  # the other sections are worth having
                say(traceback.format_exc())


if __name__ == "__main__":
    main()
