"""All that tpray calls or replaces of Ray 2.60's private functions; nothing else of tpray may name one.

A function of Ray's that its documentation does not have may be another one in the next release. So each is here, behind
a function that says what it is for, and `tests/test_ray_private.py` holds each against Ray's own code: where Ray has
changed, the test that fails says what of tpray depends on it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import auto_init_hook, services

log = logging.getLogger(__name__)

_services: Any = services
_auto_init: Any = auto_init_hook
_ray: Any = ray  # which annotates nothing of this

LOOPBACK = "127.0.0.1"
ON_LOOPBACK: dict[str, Any] = {"_node_ip_address": LOOPBACK}
"""What `ray.init` is given, after `stay_on_loopback`, so that all that it starts listens on loopback."""


def stay_on_loopback() -> None:
    """Have Ray take 127.0.0.1 for this machine's address.

    It has a parameter for that, `ON_LOOPBACK`, but turns a loopback address back into the machine's own one so that
    other nodes could join.
    """
    _services.resolve_ip_for_localhost = lambda host: host
    _services.get_node_ip_address = lambda *_, **__: LOOPBACK


def start_no_dashboard() -> None:
    """Have Ray start no dashboard process.

    Switched off, it still starts, only to ask the link-local address of cloud metadata where it runs; a default
    start must ask nobody anything.
    """
    _services.start_api_server = lambda *_, **__: ("", None)


def connect_only_when_told() -> None:
    """Have Ray's functions fail where no Ray is connected; of their own accord they start one, also after the end."""
    _auto_init.enable_auto_connect = False


def dead_processes() -> list[str]:
    """The kinds of those of Ray's processes that this process started and that have ended."""
    node = _ray._private.worker._global_node
    return [] if node is None else [kind for kind, _ in node.dead_processes()]


def ray_folder() -> Path:
    """Where Ray keeps its logs and sockets: ``RAY_TMPDIR``, or below the machine's folder for such files."""
    return Path(get_default_ray_temp_dir())


def noted_address() -> str | None:
    """The address of the control store that the last `ray start` on this machine noted; it may have ended."""
    noted: str | None = _services.find_bootstrap_address(None)
    return noted


def let_auto_mean(address: str | None) -> None:
    """Have Ray's address ``auto`` mean this one, where ``RAY_ADDRESS`` names none."""
    _services.find_bootstrap_address = lambda _: address


def running_rays() -> set[str]:
    """The addresses of the control stores of the Rays whose raylet runs on this machine."""
    running = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if arguments[0].endswith("/raylet"):
            running |= {a.partition("=")[2] for a in arguments if a.startswith("--gcs-address=")}
    return running


def available() -> dict[str, dict[str, float]]:
    """What is free on each node, by its id."""
    found: dict[str, dict[str, float]] = _ray._private.state.available_resources_per_node()
    return found


def has_ended(actor_id: str) -> bool:
    """Whether an actor has ended for good. actor_id: hexadecimal."""
    found = _ray._private.state.actors(actor_id)
    return bool(found) and found["State"] == "DEAD"


def label_mistake(labels: Mapping[str, str]) -> str | None:
    """Why these are no label selector, in Ray's words; None: they are one."""
    from ray._private.label_utils import validate_label_selector

    return validate_label_selector(dict(labels))


def nodes_are_coming() -> bool:
    """Whether Ray's autoscaler is starting nodes; True where Ray does not say.

    Version 2 of it reports to Ray's control store; version 1 leaves there what `ray status` prints.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import _internal_kv_get

    messages = cast(Any, autoscaler_pb2)
    client = _ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
    try:
        state = messages.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10)).autoscaling_state
        if state.autoscaler_state_version:
            return bool(state.pending_instance_requests or state.pending_instances)
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
        return bool(report.get("pending_nodes") or report.get("pending_launches"))
    except Exception as e:  # noqa: BLE001  # Ray's own errors are private; whoever waits has a limit anyway
        log.warning("Ray does not say whether nodes are coming: %s", e)
        return True


def keep_replica_on_loopback() -> None:
    """In a Serve replica of a Ray on loopback: have its port for other deployments listen there too.

    Serve binds that port on all addresses, after the constructor from which this is called.
    """
    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    from ray.serve._private import replica

    private: Any = replica
    bind = private.add_port_to_grpc_server
    private.add_port_to_grpc_server = lambda server, _: bind(server, f"{LOOPBACK}:0")


KEEP_GRPC_ON_LOOPBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.keep_grpc_on_loopback"}
"""The environment that has each process of Serve call `keep_grpc_on_loopback`."""


def keep_grpc_on_loopback() -> list[Any]:
    """In a process of Serve: have its gRPC server listen on loopback, where HAProxy looks for it.

    Serve binds it on all addresses. It calls this before its proxy and its replicas listen; returned are no
    middlewares.
    """
    from ray.serve._private import default_impl

    private: Any = default_impl

    def bind(server: Any, address: str) -> None:
        server.add_insecure_port(address.replace("[::]", LOOPBACK))

    private.add_grpc_address = bind
    return []


def keep_version(deployment: Any, version: str) -> None:
    """Have Serve take ``version`` for that of a deployment.

    Serve 2.60 replaces the replicas whose deployment has another version, and of a config file takes a digest of all
    its ``args`` for the version of each deployment in it; it writes that into the deployment's private configuration.
    """
    from ray.serve._private.config import DeploymentConfig

    class Kept(DeploymentConfig):
        def __setattr__(self, name: str, value: Any) -> None:
            if name != "version":
                super().__setattr__(name, value)

    config = deployment._deployment_config
    config.version = version
    config.__class__ = Kept


def builds_for_a_file() -> bool:
    """Whether this process is one in which Serve builds the application of a config file, and not the user's own."""
    return bool(ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def request_id() -> str:
    """The id of the request that the current task answers, in a process of Serve: its ``X-Request-ID``; "": none."""
    from ray.serve import context

    private: Any = context
    return str(private._get_serve_request_context().request_id)


def forget_serve() -> None:
    """Have Serve look for its controller again.

    It keeps the one that it knows as long as the job's id is the same; and the first of each Ray is the same.
    """
    from ray.serve import context

    private: Any = context
    private._disconnect()


def by_reference(handle: Any, through_ray: bool) -> Any:
    """Serve's handle, whose calls go through Ray's object store, as `broadcast` needs it, or straight to a replica."""
    return handle.options(_by_reference=through_ray)


async def serve_listens() -> tuple[str | None, bool]:
    """Where Serve's own settings have it listen for others.

    Returns:
        HTTP's host, None: nowhere; and whether gRPC answers, which is on all addresses.
    """
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:  # there is no controller, and so no HTTP
        return None, False
    http: Any = await controller.get_http_config.remote()
    where: Any = await controller.get_proxy_location.remote()
    grpc: Any = await controller.get_grpc_config.remote()
    has_http = where != serve.config.ProxyLocation.Disabled
    return http.host if has_http else None, bool(grpc.port > 0 and grpc.grpc_servicer_functions)


async def ask_all(handle: Any, method: str, limit_s: float) -> tuple[list[Any], int]:
    """What the replicas of a deployment answer within ``limit_s``, and how many do not.

    Ray's own ``results_async`` gives nothing where one of them is late.
    """
    give_up = asyncio.get_running_loop().time() + limit_s
    asked: Any = handle.broadcast(method)
    try:
        each = await asyncio.wait_for(asked._fetch_replica_results_async(), limit_s)
    except TimeoutError:
        return [], 1
    tasks = [asyncio.ensure_future(result.get_async()) for result in each]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, give_up - asyncio.get_running_loop().time()))
    finally:  # whoever asked may have left meanwhile
        for task in tasks:
            task.cancel()
    done = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is None]
    return [task.result() for task in done], len(tasks) - len(done)
