"""What of Ray 2.60's private functions is replaced, so that a Ray of one's own stays on loopback and asks nobody."""

from __future__ import annotations

from typing import Any

import ray
from ray._private import services

_services: Any = services


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
