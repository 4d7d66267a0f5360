"""Several Ray nodes on this machine: groups follow the load, and come back elsewhere when their node dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tpray.config import ServeConfig, stay_quiet

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for a group; nodes are added by the tests."""
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
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        made.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1")


def deploy(port: int, **changes: Any) -> Any:
    from ray import serve

    from tpray.serving.app import application

    args = {"parallel": {"tp": 2, "cores_per_rank": 1}, "model": {"dtype": "float32"}} | changes
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return serve.run(application(ServeConfig.model_validate(args)), name="tpray", _blocking=True)


def replicas() -> int:
    from ray import serve

    deployment = serve.status().applications["tpray"].deployments["Classifier"]
    return int(deployment.replica_states.get("RUNNING", 0))


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.3)


def test_a_second_group_comes_with_the_load_and_goes_with_it(cluster: Any, free_port: Callable[[], int]) -> None:
    """On the second node, because the first has no room; every request of the whole time is answered."""
    add_node(cluster)
    add_node(cluster)
    autoscaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, "upscale_delay_s": 1,
        "downscale_delay_s": 3, "look_back_period_s": 2,
    }  # fmt: skip
    handle = deploy(free_port(), autoscaling=autoscaling)
    assert replicas() == 1
    stop = threading.Event()

    def load() -> int:
        answered = 0
        while not stop.is_set():
            assert len(handle.classify.remote([f"the firm {answered} is in the city of Paris"] * 8).result()) == 8
            answered += 1
        return answered

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(load) for _ in range(16)]
        try:
            wait_for(lambda: replicas() == 2, 90, "a second group")
        finally:
            stop.set()
        assert all(client.result() > 0 for client in clients)
    wait_for(lambda: replicas() == 1, 90, "the second group's end")


def test_a_group_comes_back_on_another_node(cluster: Any, free_port: Callable[[], int]) -> None:
    node = add_node(cluster)
    handle = deploy(free_port())
    assert handle.classify.remote("a b").result()
    add_node(cluster)
    cluster.remove_node(node, allow_graceful=False)

    def answers() -> bool:
        try:
            return bool(handle.classify.remote("a b").result(timeout_s=5))
        except Exception:  # noqa: BLE001  # whatever a handle raises while its only replica is gone
            return False

    wait_for(answers, 120, "an answer from the other node")
