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

import ray

from tpray import ray_private
from tpray.config import SPARE_CPUS, SPARE_CPUS_LABEL, ray_address, stay_quiet, variable_set
from tpray.errors import ConfigError
from tpray.local_ray import watchdog
from tpray.local_ray.preflight import check_machine
from tpray.platforms.lease import Lease

log = logging.getLogger(__name__)


def ensure_ray(cpus: int) -> bool:
    """Connect to the Ray that this process or ``RAY_ADDRESS`` names, or start one with ``cpus`` CPUs.

    Returns:
        Whether it was started here, so that the caller shuts it down.
    """
    with _connecting:
        _leave_what_is_gone()
        if ray.is_initialized():
            return False
        stay_quiet()
        address = ray_address()
        if not address:
            check_machine()
            start_ray(cpus)
            return True
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ConfigError(f"no Ray answers at RAY_ADDRESS={address}: start it, or unset the variable ({e})") from e
        return False


OBJECT_STORE_BYTES = 256 * 2**20
"""Nothing large goes through it. Ray's default, 30 % of the memory, wants a /dev/shm that containers do not have."""

_watchdog: subprocess.Popen[bytes] | None = None  # of the Ray that this process started

_connecting = threading.RLock()
"""Whoever makes or ends this process's connection to a Ray: Ray crashes a process where two threads do so at once."""

_joined: str | None = None  # the address of the Ray, another process's, that `join_ray` connected this one to


def start_ray(cpus: int, folder: Path | None = None, lease: Lease | None = None) -> None:
    """Start a Ray on this machine that listens on loopback only; end it with `stop_ray`.

    Call `preflight.check_machine` before.

    Args:
        cpus: how many CPUs Ray may hand out to groups; others get `tpray.config.SPARE_CPUS` besides.
        folder: a folder that is removed with this Ray.
        lease: ports that nobody gets as long as a process of this Ray is left.

    A server that was started by one command must not be reachable from elsewhere unasked. However this process
    ends, nothing of that Ray stays: see `watchdog`.
    """
    with _connecting:
        _leave_what_is_gone()
        _start_ray(cpus, folder, lease)


def _start_ray(cpus: int, folder: Path | None, lease: Lease | None) -> None:
    global _watchdog
    ray_private.stay_on_loopback()
    ray_private.start_no_dashboard()
    mark = secrets.token_hex(16)
    arguments = [mark, str(ray_private.ray_folder()), str(os.getpid()), *([str(folder)] if folder else [])]
    _watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        pass_fds=lease.fds if lease is not None else (),
        start_new_session=True,  # Ctrl-C in a terminal goes to the whole foreground group
    )  # fmt: skip
    try:
        # The mark only while Ray starts: what this process starts later, a notebook's own commands say, is not Ray's.
        # No interrupt meanwhile: half of Ray cannot be shut down, since its threads crash the process.
        with variable_set(watchdog.MARK, mark), _interrupts_held():
            ray.init(
                address="local",  # a Ray of our own even where another one runs
                num_cpus=cpus + SPARE_CPUS,
                labels={SPARE_CPUS_LABEL: str(SPARE_CPUS)},
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **ray_private.ON_LOOPBACK,
            )
    except BaseException as e:
        stop_ray()
        if isinstance(e, OSError):  # it keeps a token in the home folder
            hint = "set HOME to a folder that can be written" if e.filename else "see its logs"
            raise ConfigError(f"Ray cannot start: {e}; {hint}") from e
        raise


def dead_process() -> str | None:
    """What has ended of the Ray that `start_ray` started, so that it cannot go on; None if all of it runs."""
    return next((name for name in ray_private.dead_processes() if name in ("gcs_server", "raylet")), None)


def stop_ray() -> None:
    """End the Ray that `start_ray` started, and wait until nothing of it is left."""
    global _watchdog
    with _connecting:
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


def join_ray(address: str | None = None) -> None:
    """Connect this process to the Ray that `start_ray` started in another one.

    Args:
        address: of that Ray; the default is the only one that runs here.

    Raises:
        ConfigError: none runs here, or several.
    """
    global _joined
    with _connecting:
        _leave_what_is_gone()
        if ray.is_initialized():
            return
        stay_quiet()
        ray_private.stay_on_loopback()
        try:
            ray_private.let_auto_mean(address or _only_running_ray())
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as e:
            raise ConfigError("no Ray runs on this machine: start a server with `tpray serve` first") from e
        found = connected_to()
        _joined = found if found in ray_private.running_rays() else None  # or nobody here could see it end


def _only_running_ray() -> str | None:
    """The address of the Ray that runs on this machine, of several that which `ray start` noted; None: look at
    ``RAY_ADDRESS``.

    Ray itself believes that note even when the Ray it names was killed, and waits for it for minutes.

    Raises:
        ConnectionError: none runs, and ``RAY_ADDRESS`` names none.
        ConfigError: several run, and nothing says which is meant.
    """
    noted, running = ray_private.noted_address(), ray_private.running_rays()
    if noted in running:
        return noted
    if len(running) > 1:
        raise ConfigError(
            f"{len(running)} Rays run on this machine, and this could be any of them: name the server, as in "
            'tpray.connect(url="http://127.0.0.1:8000"), or set RAY_ADDRESS'
        )
    if not running and ray_address() is None:
        raise ConnectionError("nothing of Ray runs here")
    return next(iter(running), None)


def quiet_logs() -> None:
    """Have Ray and Serve tell of errors only; Serve sets its own level when it is first asked."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connected_to() -> str | None:
    """The address of the Ray that this process is connected to; None: to none."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def leave_ray(address: str) -> None:
    """End the connection of this process to a Ray that has ended, unless it has another one by now.

    address: of the Ray that has ended.
    """
    global _joined
    with _connecting:
        if connected_to() == address:
            try:
                ray.shutdown()
            except Exception as e:  # noqa: BLE001  # of a Ray that is gone; the next connection starts from nothing
                log.info("the connection to a Ray that is gone did not end well: %r", e)
        if _joined == address:
            _joined = None
        ray_private.forget_serve()


def _leave_what_is_gone() -> None:
    """End the connection that `join_ray` made, where that Ray has ended and nobody has noticed yet."""
    if _joined is not None and _joined not in ray_private.running_rays():
        leave_ray(_joined)
