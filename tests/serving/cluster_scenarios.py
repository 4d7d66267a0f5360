"""Several Ray nodes on this machine: python -m tests.serving.cluster_scenarios NAME PORT, a process for each scenario.

A head without CPUs, and nodes of two CPUs with room for one group each. Prints what happened when, as JSON.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

# Serve's processes read these when they are imported: how often a replica reports, and how soon the dead are found.
os.environ |= {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_initial_delay_ms": "2000",
}

from tpray.config import ServeConfig, stay_quiet

STARTED = time.monotonic()
EVENTS: dict[str, float] = {}


def note(what: str) -> None:
    EVENTS[what] = round(time.monotonic() - STARTED, 1)
    print(f"{EVENTS[what]:6.1f} s  {what}", file=sys.stderr, flush=True)


@contextmanager
def cluster() -> Iterator[Any]:
    """A head without room for a group."""
    import ray
    from ray.cluster_utils import Cluster

    from tpray.group.cluster import _stay_on_loopback

    stay_quiet()
    _stay_on_loopback()
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"},
    )
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_node(made: Any) -> Any:
    return made.add_node(num_cpus=2, node_ip_address="127.0.0.1")


def deploy(port: int, **changes: Any) -> Any:
    from ray import serve

    from tpray.serving.app import application

    args = {"parallel": {"tp": 2, "cores_per_rank": 1}, "model": {"dtype": "float32"}} | changes
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return serve.run(application(ServeConfig.model_validate(args)), name="tpray")


def replicas() -> dict[str, str]:
    """The running replicas: id -> node."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    details = client.get_serve_details()["applications"]["tpray"]["deployments"]["Classifier"]["replicas"]
    return {r["replica_id"]: r["node_id"] for r in details if r["state"] == "RUNNING"}


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen within {timeout_s:.0f} s; {EVENTS}"
        time.sleep(0.3)
    note(what)


def follow_the_load(port: int) -> None:
    """Load rises: a second group comes, on the second node. Load falls: it goes. Every request is answered."""
    with cluster() as made:
        add_node(made)
        add_node(made)
        scaling = {
            "max_replicas": 2, "backlog_tokens": 200, "upscale_delay_s": 1, "downscale_delay_s": 3,
            "look_back_period_s": 5,
        }  # fmt: skip
        handle = deploy(port, autoscaling=scaling)
        assert len(replicas()) == 1
        note("one group")
        stop = threading.Event()

        def load() -> int:
            answered = 0
            while not stop.is_set():
                texts = [f"the firm number {answered} is in the city of Paris and not in London"] * 16
                assert len(handle.classify.remote(texts).result(timeout_s=60)) == 16
                answered += 1
            return answered

        with ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(load) for _ in range(16)]
            try:
                wait_for(lambda: len(replicas()) == 2, 100, "a second group")
                assert len(set(replicas().values())) == 2, "on the second node"
            finally:
                stop.set()
            EVENTS["answered"] = sum(client.result() for client in clients)
        wait_for(lambda: len(replicas()) == 1, 100, "the second group's end")


def outlive_a_node(port: int) -> None:
    """A node is killed under load: its group comes back on the other one, and answers."""
    with cluster() as made:
        node = add_node(made)
        handle = deploy(port)
        note("one group")
        (before,) = replicas().items()
        stop = threading.Event()
        failed = 0

        def load() -> None:
            nonlocal failed
            while not stop.is_set():
                try:
                    handle.classify.remote("a b").result(timeout_s=5)
                except Exception:  # noqa: BLE001  # whatever a handle raises while its only replica is gone
                    failed += 1
                    time.sleep(0.2)

        with ThreadPoolExecutor(2) as pool:
            clients = [pool.submit(load) for _ in range(2)]
            add_node(made)
            made.remove_node(node, allow_graceful=False)
            note("a node is killed")
            try:
                wait_for(lambda: bool(replicas().items() - {before}), 120, "its group on another node")
                assert handle.classify.remote("a b").result(timeout_s=30)
                note("an answer")
            finally:
                stop.set()
            for client in clients:
                client.result()
        EVENTS["failed requests meanwhile"] = failed
        assert before[1] not in replicas().values()


if __name__ == "__main__":
    {"load": follow_the_load, "death": outlive_a_node}[sys.argv[1]](int(sys.argv[2]))
    print(json.dumps(EVENTS))
