"""A Ray of one's own, on this machine and on loopback, for the commands and for notebooks.

Nothing here is needed where Ray runs already: `ensure_ray` then leaves it alone.
"""

from __future__ import annotations

import logging
from typing import Any

import ray

from tpray.config import ray_address, stay_quiet
from tpray.errors import ConfigError

log = logging.getLogger("tpray.cluster")


def ensure_ray(cpus: int) -> bool:
    """Connect to the Ray that this process or ``RAY_ADDRESS`` names, or start one with ``cpus`` CPUs.

    Returns:
        Whether it was started here, so that the caller shuts it down.
    """
    if ray.is_initialized():
        return False
    stay_quiet()
    address = ray_address()
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ConfigError(f"no Ray answers at RAY_ADDRESS={address}: start it, or unset the variable ({e})") from e
        return False
    start_ray(cpus)
    return True


def start_ray(cpus: int) -> None:
    """Start a Ray on this machine that listens on loopback only.

    A server that was started by one command must not be reachable from elsewhere unasked.
    """
    _stay_on_loopback()
    ray.init(
        address="local",  # a Ray of our own even where another one runs
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def join_ray() -> None:
    """Connect this process to the Ray that `start_ray` started in another one.

    Raises:
        ConfigError: none runs here.
    """
    if ray.is_initialized():
        return
    stay_quiet()
    _stay_on_loopback()
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as e:
        raise ConfigError("no Ray runs on this machine: start a server with `tpray serve` first") from e


def _stay_on_loopback() -> None:
    """Have Ray take 127.0.0.1 for this machine's address.

    It has a parameter for that, ``_node_ip_address``, but turns a loopback address back into the machine's own
    one so that other nodes could join. Both functions belong to Ray 2.60, all that tpray installs with.
    """
    from ray._private import services

    private: Any = services
    private.resolve_ip_for_localhost = lambda host: host
    private.get_node_ip_address = lambda *_, **__: "127.0.0.1"
