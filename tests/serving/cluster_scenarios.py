"""Several Ray nodes on this machine: python -m tests.serving.cluster_scenarios NAME PORT, a process for each scenario.

A head without CPUs, and nodes of two CPUs with room for one group each. Prints what happened when, as JSON.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

from tests.local_ray.ray_head import ON_LOOPBACK, ray_head

# Serve's processes read these when they are imported: how often a replica reports, how soon the dead are found, and
# that nothing connects to Ray unasked, as Serve's handle would, which reports to the controller to the end.
os.environ |= ON_LOOPBACK | {
    "RAY_ENABLE_AUTO_CONNECT": "0",
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

    stay_quiet()
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


def add_node(made: Any, cache: str | None = None) -> Any:
    """A node, which is a machine of its own if it has a cache of its own."""
    variables = {"TPRAY_CACHE": cache} if cache else {}
    return made.add_node(num_cpus=2, node_ip_address="127.0.0.1", env_vars=os.environ | variables)


def ask(port: int, path: str, body: dict[str, Any] | None = None, timeout_s: float = 10) -> Any:
    """What the server answers; None if it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except OSError:
        return None


def deploy(port: int, **changes: Any) -> Any:
    from ray import serve

    from tpray.serving.app import build

    args = {"parallel": {"tp": 2, "cores_per_rank": 1}, "model": {"dtype": "float32"}} | changes
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return serve.run(build(ServeConfig.model_validate(args)), name="tpray")


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
    """Load rises: a second group comes, on the second node, from what the first has put into the store that both share.

    Load falls: it goes. Every request is answered.
    """
    with cluster() as made, tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            add_node(made, f"{folder}/{name}")
        scaling = {
            "max_replicas": 2, "backlog_tokens": 200, "upscale_delay_s": 1, "downscale_delay_s": 3,
            "look_back_period_s": 5,
        }  # fmt: skip
        handle = deploy(port, autoscaling=scaling, model={"dtype": "float32", "store": f"file://{folder}/store"})
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
                starts: dict[int, Any] = {}  # by the process of rank 0
                wait_for(
                    lambda: bool((info := ask(port, "/info")) and starts.update({info["ranks"][0]["pid"]: info}))
                    or len(starts) == 2, 30, "both have said how they started",
                )  # fmt: skip
                assert sorted(info["traced_now"] for info in starts.values()) == [False, True]
                for info in starts.values():
                    phases = [phase["phase"] for phase in info["startup"]]
                    assert ("trace" in phases) == info["traced_now"], (
                        "only the first traces; the other takes it from the store"
                    )
                    assert phases[-4:] == ["load", "check", "warm up", "tokenizer"]
                    assert sum(phase["seconds"] for phase in info["startup"]) > 0.1
            finally:
                stop.set()
            EVENTS["answered"] = sum(client.result() for client in clients)
        wait_for(lambda: len(replicas()) == 1, 100, "the second group's end")


def come_from_nothing(port: int) -> None:
    """Nobody asks: the last group goes. A request comes over HTTP: it waits for a group, and is answered."""
    with cluster() as made, tempfile.TemporaryDirectory() as folder:
        add_node(made, folder)
        scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 2, "look_back_period_s": 4}
        deploy(port, autoscaling=scaling)
        assert len(replicas()) == 1, "the first start shows what cannot work"
        answer = ask(port, "/predict", {"inputs": "a b"})
        assert answer
        note("one group")
        wait_for(lambda: not replicas(), 150, "no group")
        for number in (1, 2):
            asked = time.monotonic()
            late = ask(port, "/predict", {"inputs": "a b"}, 120)
            EVENTS[f"seconds to answer {number}"] = round(time.monotonic() - asked, 2)
            assert late == answer
        assert len(replicas()) == 1
        note("an answer")


MAY_FAIL = {"ActorDiedError", "ActorUnavailableError", "RayActorError", "TimeoutError", "GetTimeoutError"}
"""How a handle's requests may fail while the only replica is gone: it died, or none came in time."""
GRACE_S = 6.0
"""A request that was sent before the group was back may still run into its 5 s."""


def outlive_a_node(port: int) -> None:
    """A node is killed under load: its group comes back on the other one, and answers."""
    with cluster() as made:
        node = add_node(made)
        handle = deploy(port)
        note("one group")
        (before,) = replicas().items()
        stop = threading.Event()
        wanted = [score["label"] for score in handle.classify.remote("a b").result(timeout_s=30)]
        failures: list[tuple[float, str]] = []  # when, and of which kind
        answered: list[float] = []

        def load() -> None:
            while not stop.is_set():
                try:
                    answer = handle.classify.remote("a b").result(timeout_s=5)
                except Exception as e:  # noqa: BLE001  # judged below, by its kind and its time
                    failures.append((time.monotonic(), type(e).__name__))
                    time.sleep(0.2)
                else:
                    assert [score["label"] for score in answer] == wanted, "nobody gets a wrong answer"
                    answered.append(time.monotonic())

        with ThreadPoolExecutor(2) as pool:
            clients = [pool.submit(load) for _ in range(2)]
            add_node(made)
            made.remove_node(node, allow_graceful=False)
            note("a node is killed")
            try:
                wait_for(lambda: bool(replicas().items() - {before}), 120, "its group on another node")
                assert handle.classify.remote("a b").result(timeout_s=30)
                note("an answer")
                back = time.monotonic()
                time.sleep(GRACE_S + 3)
            finally:
                stop.set()
            for client in clients:
                client.result()
        EVENTS["failed requests meanwhile"] = len(failures)
        kinds = {kind for _, kind in failures}
        print(f"kinds of failures: {sorted(kinds)}", file=sys.stderr)
        assert kinds <= MAY_FAIL, f"requests failed otherwise than by the death of their replica: {kinds - MAY_FAIL}"
        assert not [when for when, _ in failures if when > back + GRACE_S], "they fail no longer once the group is back"
        assert [when for when in answered if when > back + GRACE_S]
        assert before[1] not in replicas().values()


@contextmanager
def autoscaled(worker: dict[str, float]) -> Iterator[None]:
    """A head without CPUs whose autoscaler may start one more node, with the resources ``worker``."""
    import ray
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    stay_quiet()
    none: list[str] = []
    config = {
        "cluster_name": "tpray-test", "max_workers": 1, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "inf2": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
        "head_node_type": "ray.head.default", "auth": {}, "file_mounts": {}, "cluster_synced_files": none,
        "initialization_commands": none, "setup_commands": none, "head_setup_commands": none,
        "worker_setup_commands": none, "head_start_ray_commands": none, "worker_start_ray_commands": none,
    }  # fmt: skip
    environ = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    port = 6379  # Ray's own stand-in for a cloud knows no other
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        arguments = [f"--autoscaling-config={file.name}", "--include-dashboard=false"]
        with ray_head(port, 0, *arguments, **environ):
            ray.init(address=f"127.0.0.1:{port}", log_to_driver=False)
            try:
                yield
            finally:
                ray.shutdown()


def wait_for_a_node_type(port: int) -> None:
    """Nobody has NeuronCores: a group waits for them, the autoscaler adds the node type that has, and it answers."""
    import ray

    with autoscaled({"CPU": 4, "neuron_cores": 2}):
        assert all("neuron_cores" not in node["Resources"] for node in ray.nodes())
        note("a head alone")
        parallel = {"tp": 2, "runtime": "neuron", "instance_family": "trn2"}
        deploy(port, parallel=parallel, model={"dtype": "float32", "buckets": [[1, 32]]})
        note("one group")
        assert any(node["Resources"].get("neuron_cores") == 2 for node in ray.nodes() if node["Alive"])
        wait_for(lambda: bool(ask(port, "/predict", {"inputs": "a b"})), 60, "an answer")


@contextmanager
def s3() -> Iterator[str]:
    """The URL of an empty folder in a stand-in for S3, which the nodes that are started in the block reach."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3").create_bucket(Bucket="models")
    yield "s3://models/traced"
    server.stop()


def join_late(port: int) -> None:
    """Of two groups one waits for a node. It joins with an empty cache, and all that the group needs is in a store."""
    from ray import serve

    from tpray import load
    from tpray.group.thread_executor import ThreadExecutor
    from tpray.serving.app import build

    with tempfile.TemporaryDirectory() as folder, s3() as store:
        os.environ["TPRAY_CACHE"] = f"{folder}/tracing"
        with load(tp=2, dtype="float32", executor=ThreadExecutor(2), store=store) as classifier:
            url = str(classifier.group.url)
        note("the artifact in the store")
        with cluster() as made:
            add_node(made, f"{folder}/first")
            args = {"model": {"source": url}, "parallel": {"tp": 2, "cores_per_rank": 1}, "replicas": 2}
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            target = serve.RunTarget(build(ServeConfig.model_validate(args)), name="tpray", route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
            wait_for(lambda: len(replicas()) == 1, 100, "one group")
            first = ask(port, "/info")["ranks"][0]["pid"]
            add_node(made, f"{folder}/second")
            note("a node joins")
            seen: list[dict[str, Any]] = []

            def second_answers() -> bool:
                info = ask(port, "/info")
                if info and info["ranks"][0]["pid"] != first:
                    seen.append(info)
                return bool(seen)

            wait_for(second_answers, 100, "the second group's answer")
            phases = {phase["phase"]: phase for phase in seen[0]["startup"]}
            assert "trace" not in phases
            assert f"MB from {url}" in phases["fetch"]["note"]
            EVENTS["its phases"] = round(sum(phase["seconds"] for phase in phases.values()), 1)
            for phase in phases.values():
                print(f"{phase['seconds']:8.2f} s  {phase['phase']}  {phase['note']}", file=sys.stderr)


if __name__ == "__main__":
    scenarios = {
        "join": join_late, "load": follow_the_load, "zero": come_from_nothing, "death": outlive_a_node,
        "grow": wait_for_a_node_type,
    }  # fmt: skip
    scenarios[sys.argv[1]](int(sys.argv[2]))
    print(json.dumps(EVENTS))
