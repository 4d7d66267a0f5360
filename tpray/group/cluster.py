"""A Ray of one's own, on this machine and on loopback, for the commands and for notebooks.

Nothing here is needed where Ray runs already: `ensure_ray` then leaves it alone.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services

from tpray.config import ray_address, stay_quiet
from tpray.errors import ConfigError
from tpray.group import watchdog

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


_watchdog: subprocess.Popen[bytes] | None = None  # of the Ray that this process started


def start_ray(cpus: int, folder: Path | None = None) -> None:
    """Start a Ray on this machine that listens on loopback only; end it with `stop_ray`.

    Args:
        cpus: how many CPUs Ray may hand out.
        folder: a folder that is removed with this Ray.

    A server that was started by one command must not be reachable from elsewhere unasked. However this process
    ends, nothing of that Ray stays: see `watchdog`.
    """
    global _watchdog
    _stay_on_loopback()
    _start_no_dashboard()
    mark = secrets.token_hex(16)
    arguments = [mark, get_default_ray_temp_dir(), str(os.getpid()), *([str(folder)] if folder else [])]
    _watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        start_new_session=True,  # Ctrl-C in a terminal goes to the whole foreground group
    )  # fmt: skip
    os.environ[watchdog.MARK] = mark
    try:
        with _interrupts_held():  # half of Ray cannot be shut down: its threads crash the process
            ray.init(
                address="local",  # a Ray of our own even where another one runs
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
    except BaseException:
        stop_ray()
        raise
    finally:
        # What this process starts from now on, a notebook's own commands say, is not Ray's.
        del os.environ[watchdog.MARK]


def stop_ray() -> None:
    """End the Ray that `start_ray` started, and wait until nothing of it is left."""
    global _watchdog
    if ray.is_initialized():
        ray.shutdown()
    if _watchdog is not None:
        _watchdog.communicate(b"." if _watchdog.poll() is None else None)
        _watchdog = None


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Within the block Ctrl-C waits; it is raised, or handled, at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's alone
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


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


def _stay_on_loopback() -> None:
    """Have Ray take 127.0.0.1 for this machine's address.

    It has a parameter for that, ``_node_ip_address``, but turns a loopback address back into the machine's own
    one so that other nodes could join. Both functions belong to Ray 2.60, all that tpray installs with.
    """
    private: Any = services
    private.resolve_ip_for_localhost = lambda host: host
    private.get_node_ip_address = lambda *_, **__: "127.0.0.1"


def _start_no_dashboard() -> None:
    """Have Ray start no dashboard process.

    Switched off, it still starts, only to ask the link-local address of cloud metadata where it runs; a default
    start must ask nobody anything.
    """
    private: Any = services
    private.start_api_server = lambda *_, **__: ("", None)
