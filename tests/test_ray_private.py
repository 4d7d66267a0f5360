"""Ray's private functions are as tpray takes them to be; a test that fails names what has changed, and who needs it."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray._private import auto_init_hook, node, services, worker
from ray.serve._private import controller, default_impl, grpc_util, http_util, replica

from tpray import ray_private
from tpray.config import SPARE_CPUS
from tpray.serving import haproxy

REPLACED = {
    (services, "resolve_ip_for_localhost"): "(host)",
    (services, "get_node_ip_address"): "(address=None)",
    (services, "start_api_server"): None,
    (services, "find_bootstrap_address"): "(temp_dir)",
    (auto_init_hook, "enable_auto_connect"): None,
    (replica, "add_port_to_grpc_server"): "(server, address)",
    (default_impl, "add_grpc_address"): "(grpc_server, server_address)",
}
"""What `tpray.ray_private` replaces, and with what arguments Ray calls it."""


ORIGINALS = {(module, name): getattr(module, name, None) for module, name in REPLACED}
"""Ray's own, for this module is imported before any test runs, and other tests have some replaced for good."""


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), original in ORIGINALS.items():
        monkeypatch.setattr(module, name, original)


def expect(holds: object, ray_name: str, needed: str) -> None:
    assert holds, (
        f"{ray_name} of Ray {ray.__version__} is another one than that of Ray 2.60, and {needed} depends on it: look "
        "at tpray/ray_private.py"
    )


def source(of: Any) -> str:
    """Ray's code, whatever wraps it."""
    of = getattr(getattr(of, "__ray_metadata__", None), "modified_class", of)
    return inspect.getsource(of)


def arguments(of: Any) -> str:
    """The signature without annotations."""
    shown = inspect.signature(of)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in shown.parameters.values()]
    return str(shown.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(("module", "name"), REPLACED)
def test_what_is_replaced_is_there(module: Any, name: str) -> None:
    expected, found = REPLACED[module, name], ORIGINALS[module, name]
    where = f"{module.__name__}.{name}"
    expect(found is not None, where, "what replaces it")
    expect(expected is None or arguments(found) == expected, where, f"what replaces it, with the arguments {expected}")


def test_ray_looks_its_address_up_where_it_is_replaced() -> None:
    needed = "stay_on_loopback: that nothing of a Ray of one's own listens on the network"
    expect('kwargs.pop("_node_ip_address"' in source(worker.init), "ray.init(_node_ip_address=...)", needed)
    expect("services.resolve_ip_for_localhost(_node_ip_address)" in source(worker.init), "ray.init", needed)
    expect("ray._private.services.get_node_ip_address()" in source(node.Node), "Node", needed)
    assert services.canonicalize_bootstrap_address("10.1.2.3:6379") == "10.1.2.3:6379"
    ray_private.stay_on_loopback()
    found = services.canonicalize_bootstrap_address("127.0.0.1:6379")
    expect(found == "127.0.0.1:6379", "services.canonicalize_bootstrap_address", needed)
    assert cast(Any, services).get_node_ip_address() == "127.0.0.1"


def test_no_dashboard_is_started() -> None:
    ray_private.start_no_dashboard()
    own = SimpleNamespace(
        _ray_params=SimpleNamespace(dashboard_host="", dashboard_port=0, proxy_server_url=""),
        get_log_file_names=lambda *_, **__: ("", ""), cluster_id=SimpleNamespace(hex=str), gcs_address="", temp_dir="",
        _node_ip_address="", _logs_dir="", _session_dir="", kernel_fate_share=False, max_bytes=0, backup_count=0,
        all_processes={},
    )  # fmt: skip
    cast(Any, node.Node).start_api_server(own, include_dashboard=False, raise_on_failure=False)
    needed = "start_no_dashboard: that a start asks nobody anything"
    expect(own.all_processes == {}, "Node.start_api_server", needed)


def test_a_function_of_ray_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "connect_only_when_told: that the end of a server does not start another Ray"
    started: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda: started.append(True))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    auto_init_hook.auto_init_ray()
    expect(started == [True], "auto_init_hook.auto_init_ray", needed)
    ray_private.connect_only_when_told()
    auto_init_hook.auto_init_ray()
    expect(started == [True], "auto_init_hook.enable_auto_connect", needed)


def test_processes_of_ray_that_have_ended_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "dead_processes: that a server whose Ray has ended says so"
    assert ray_private.dead_processes() == []
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own: Any = object.__new__(node.Node)
    own.all_processes = {"raylet": [SimpleNamespace(process=ended)]}
    own._node_ip_address = "127.0.0.1"
    monkeypatch.setattr(node.Node, "__del__", lambda _: None, raising=False)
    monkeypatch.setattr(worker, "_global_node", own)
    expect(ray_private.dead_processes() == ["raylet"], "Node.dead_processes, worker._global_node", needed)
    for kind in ("gcs_server", "raylet"):
        known = (cast(Any, ray)._private.ray_constants.PROCESS_TYPE_GCS_SERVER, "raylet")
        expect(kind in known, "ray_constants.PROCESS_TYPE_...", needed)


def test_rays_folder_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    needed = "ray_folder: the checks of a machine, and the watchdog, which removes what Ray leaves"
    expect(ray_private.ray_folder() == tmp_path / "ray", "get_default_ray_temp_dir", needed)
    expect("session_" in source(node), "Node's name of a session's folder", needed)


def test_the_ray_that_auto_means_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = "let_auto_mean: that tpray.connect finds its server"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    expect(ray_private.noted_address() == "127.0.0.1:6379", "services.find_bootstrap_address", needed)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    ray_private.let_auto_mean("127.0.0.1:1234")
    found = services.get_ray_address_from_environment("auto", None)
    expect(found == "127.0.0.1:1234", "services.get_ray_address_from_environment", needed)


def test_a_raylet_says_which_control_store_is_its_own() -> None:
    expect(
        'f"--gcs-address={gcs_address}"' in source(services.start_raylet),
        "services.start_raylet",
        "running_rays: that a Ray which runs on this machine is found",
    )


@pytest.mark.parametrize(
    ("labels", "right"), [({}, True), ({"zone": "in(a,b)"}, True), ({"zone": "!a"}, True), ({"zone": "in(a"}, False)]
)
def test_label_selectors_are_checked(labels: dict[str, str], right: bool) -> None:
    found = ray_private.label_mistake(labels)
    expect((found is None) == right, "label_utils.validate_label_selector", "label_mistake: the check of node_labels")


def test_the_autoscalers_reports_have_what_is_read() -> None:
    from ray._private import ray_constants
    from ray.core.generated import autoscaler_pb2
    from ray.experimental import internal_kv

    needed = "nodes_are_coming: how long a group waits for a node"
    state = cast(Any, autoscaler_pb2).GetClusterStatusReply().autoscaling_state
    for name in ("autoscaler_state_version", "pending_instance_requests", "pending_instances"):
        expect(hasattr(state, name), f"autoscaler_pb2's {name}", needed)
    expect(hasattr(ray_constants, "DEBUG_AUTOSCALING_STATUS"), "ray_constants.DEBUG_AUTOSCALING_STATUS", needed)
    expect(hasattr(internal_kv, "_internal_kv_get"), "internal_kv._internal_kv_get", needed)


class Bound:
    """A gRPC server that says where it would listen."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def add_insecure_port(self, address: str) -> int:
        self.addresses.append(address)
        return 1


def test_a_replicas_port_for_other_deployments_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "keep_replica_on_loopback: that a replica listens on loopback alone"
    bound = 'add_port_to_grpc_server(self._server, "[::]:0")'
    expect(bound in source(replica), "replica.add_port_to_grpc_server", needed)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    ray_private.keep_replica_on_loopback()
    server = Bound()
    cast(Any, replica).add_port_to_grpc_server(server, "[::]:0")
    expect(server.addresses == ["127.0.0.1:0"], "replica.add_port_to_grpc_server", needed)


def test_grpc_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "keep_grpc_on_loopback: that gRPC is reached through HAProxy alone"
    (name, path), *_ = ray_private.KEEP_GRPC_ON_LOOPBACK.items()
    expect(hasattr(http_util, name), f"http_util.{name}", needed)
    monkeypatch.setattr(http_util, name, path)
    options = http_util.configure_http_middlewares(ray.serve.config.HTTPOptions())
    expect(options.middlewares == [], "http_util.configure_http_middlewares", needed)
    imported = "from ray.serve._private.default_impl import add_grpc_address"
    expect(imported in source(grpc_util.start_grpc_server), "grpc_util.start_grpc_server", needed)
    expect(
        "configure_http_middlewares(" in source(replica), "replica: when configure_http_middlewares is called", needed
    )
    server = Bound()
    cast(Any, default_impl).add_grpc_address(server, "[::]:9000")
    expect(server.addresses == ["127.0.0.1:9000"], "default_impl.add_grpc_address", needed)


def test_a_deployment_keeps_the_version_that_it_is_given() -> None:
    from ray.serve._private import deploy_utils
    from ray.serve._private.config import DeploymentConfig

    needed = "keep_version: that another number of groups, or one changed model of several, replaces no other group"
    expect("deployment_config.version = version" in source(deploy_utils), "deploy_utils.get_deploy_args", needed)
    made: Any = ray.serve.deployment(type("Any", (), {}))
    expect(isinstance(made._deployment_config, DeploymentConfig), "Deployment._deployment_config", needed)
    ray_private.keep_version(made, "own")
    made._deployment_config.version = "Serve's"
    expect(made._deployment_config.version == "own", "DeploymentConfig.version", needed)
    kept = DeploymentConfig.from_proto_bytes(made._deployment_config.to_proto_bytes())
    expect(kept.version == "own", "DeploymentConfig.to_proto_bytes", needed)


def test_serve_knows_the_id_of_a_request() -> None:
    from ray.serve import context

    needed = "request_id: that log lines and traces have the id which the answer has"
    expect(hasattr(context, "_get_serve_request_context"), "serve.context._get_serve_request_context", needed)
    assert ray_private.request_id() == ""


def test_serve_forgets_its_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context

    monkeypatch.setattr(context, "_global_client", "one of a Ray that is gone")
    monkeypatch.setattr(context, "_global_client_job_id", "01")
    ray_private.forget_serve()
    needed = "forget_serve: that tpray.connect works again after a restart"
    expect(cast(Any, context)._global_client is None, "serve.context._disconnect", needed)


def test_a_handle_can_go_by_reference() -> None:
    taken = inspect.signature(ray.serve.handle.DeploymentHandle.options).parameters
    expect("_by_reference" in taken, "DeploymentHandle.options(_by_reference=...)", "by_reference: drain, and models")


def test_a_broadcast_has_an_answer_of_each_replica() -> None:
    from ray.serve._private import replica_result
    from ray.serve.handle import DeploymentBroadcastResponse

    needed = "ask_all: that one scrape has all replicas"
    there = inspect.iscoroutinefunction(getattr(DeploymentBroadcastResponse, "_fetch_replica_results_async", None))
    expect(there, "DeploymentBroadcastResponse._fetch_replica_results_async", needed)
    expect(hasattr(replica_result.ReplicaResult, "get_async"), "ReplicaResult.get_async", needed)


def test_the_controller_says_where_serve_listens() -> None:
    for name in ("get_http_config", "get_proxy_location", "get_grpc_config"):
        there = f"def {name}(self)" in source(controller)
        expect(there, f"ServeController.{name}", "serve_listens: that nobody serves others without a key")


def test_serves_hooks_have_their_names() -> None:
    code = source(replica)
    for name in ("__serve_build_asgi_app__", "record_autoscaling_stats"):  # the others are documented
        expect(f'"{name}"' in code, f"Serve's hook {name}", "tpray.serving.app, whose method of that name Serve calls")


def test_every_variable_that_is_set_is_one_that_serve_reads(tmp_path: Path) -> None:
    code = "".join(path.read_text() for path in (Path(ray.__file__).parent / "serve" / "_private").glob("*.py"))
    places = haproxy.places(tmp_path, tuple(range(20000, 20000 + haproxy.PORTS)), "a-token", {})
    for name in {**places, **haproxy.settings(60.0), **haproxy.grpc_settings(8001, 2_000_000)}:
        expect(re.search(rf'"{name}"', code), f"the environment variable {name}", "tpray.serving.haproxy")


@pytest.mark.ray
def test_a_ray_that_runs_is_what_these_functions_say() -> None:
    from tpray.local_ray.local import start_ray, stop_ray

    start_ray(1)
    try:
        address = ray.get_runtime_context().gcs_address
        expect(address.startswith("127.0.0.1:"), "ray.init(_node_ip_address=...)", "stay_on_loopback")
        expect(address in ray_private.running_rays(), "the raylet's command line", "running_rays")
        (free,) = ray_private.available().values()
        expect(
            free["CPU"] == 1.0 + SPARE_CPUS, "state.available_resources_per_node", "available: whether there is room"
        )
        expect(ray_private.dead_processes() == [], "Node.dead_processes", "dead_processes")

        class Kept:  # here, so that Ray carries it to its process
            def id(self) -> str:
                return str(ray.get_runtime_context().get_actor_id())

        made: Any = ray.remote(Kept)
        actor = made.options(num_cpus=0).remote()
        name = ray.get(actor.id.remote())
        expect(ray_private.has_ended(name) is False, "state.actors", "has_ended: what room dead actors have left")
        ray.kill(actor)
        give_up = time.monotonic() + 20
        while not ray_private.has_ended(name):
            assert time.monotonic() < give_up, "state.actors does not say that an actor has ended"
            time.sleep(0.1)
        expect(ray_private.nodes_are_coming() is False, "GcsClient.get_cluster_status", "nodes_are_coming")
        assert asyncio.run(ray_private.serve_listens()) == (None, False)
    finally:
        stop_ray()
