"""What of Ray 2.60's private functions is used or replaced, so that a Ray of one's own is on loopback, and is found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook, services

from tpray.config import ray_address
from tpray.errors import ConfigError

_services: Any = services
_auto_init: Any = auto_init_hook


def keep_replica_on_loopback() -> None:
    """In a Serve replica of a Ray on loopback: have its port for other deployments listen there too.

    Serve 2.60 binds that port on all addresses, after the constructor from which this is called.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    from ray.serve._private import replica

    private: Any = replica
    bind = private.add_port_to_grpc_server
    private.add_port_to_grpc_server = lambda server, _: bind(server, "127.0.0.1:0")


def keep_grpc_on_loopback() -> list[Any]:
    """In a process of Serve: have its gRPC server listen on loopback, where HAProxy looks for it.

    Serve 2.60 binds it on all addresses. It calls this, which ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names,
    before its proxy and its replicas listen; returned are no middlewares.
    """
    from ray.serve._private import default_impl

    private: Any = default_impl

    def bind(server: Any, address: str) -> None:
        server.add_insecure_port(address.replace("[::]", "127.0.0.1"))

    private.add_grpc_address = bind
    return []


def request_id() -> str:
    """The id of the request that the current task answers, in a process of Serve: its ``X-Request-ID``; "": none."""
    from ray.serve import context

    private: Any = context
    return str(private._get_serve_request_context().request_id)


def stay_on_loopback() -> None:
    """Have Ray take 127.0.0.1 for this machine's address.

    It has a parameter for that, ``_node_ip_address``, but turns a loopback address back into the machine's own
    one so that other nodes could join. Both functions belong to Ray 2.60, all that tpray installs with.
    """
    _services.resolve_ip_for_localhost = lambda host: host
    _services.get_node_ip_address = lambda *_, **__: "127.0.0.1"


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
    node: Any = ray._private.worker._global_node
    return [] if node is None else [kind for kind, _ in node.dead_processes()]


def forget_serve() -> None:
    """Have Serve look for its controller again.

    It keeps the one that it knows as long as the job's id is the same; and the first of each Ray is the same.
    """
    from ray.serve import context

    private: Any = context
    private._disconnect()


def quiet_logs() -> None:
    """Have Ray and Serve tell of errors only; Serve sets its own level when it is first asked."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def find_running_ray(address: str | None = None) -> None:
    """Have Ray's address ``auto`` mean a Ray that runs on this machine.

    Args:
        address: of its control store; the default is the only one that runs, or the one that `ray start` noted. Ray's
            own ``auto`` believes that note even when the Ray it names was killed, and waits for it for minutes.

    Raises:
        ConnectionError: none runs, and ``RAY_ADDRESS`` names none.
        ConfigError: several run, and nothing says which is meant.
    """
    if address is None:
        noted, running = _services.find_bootstrap_address(None), running_rays()
        if noted in running:
            address = noted
        elif len(running) > 1:
            raise ConfigError(
                f"{len(running)} Rays run on this machine, and this could be any of them: name the server, as in "
                'tpray.connect(url="http://127.0.0.1:8000"), or set RAY_ADDRESS'
            )
        else:
            address = next(iter(running), None)
    if address is None and ray_address() is None:
        raise ConnectionError("nothing of Ray runs here")
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
