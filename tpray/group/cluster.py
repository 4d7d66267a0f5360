"""A Ray of one's own, on this machine and on loopback, for the commands and for notebooks.

Nothing here is needed where Ray runs already: `ensure_ray` then leaves it alone.
"""

from __future__ import annotations

import logging
import os

import ray

from tpray.config import stay_quiet
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
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ConfigError(f"no Ray answers at RAY_ADDRESS={address}: start it, or unset the variable ({e})") from e
        return False
    start_ray(cpus)
    return True


def start_ray(cpus: int) -> None:
    """Start a Ray on this machine, listening on loopback where Ray lets one choose."""
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
