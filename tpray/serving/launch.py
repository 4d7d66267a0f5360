"""Start and stop a server on this machine: Ray, Serve and the application, on loopback unless told otherwise."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn
from urllib.request import urlopen

from tpray.artifacts.resolve import find_model
from tpray.config import ServeConfig, set_default_variables
from tpray.errors import ConfigError, GroupError, PlacementError, TprayError
from tpray.group.group import PhaseReport
from tpray.platforms.cores import usable_cores
from tpray.platforms.topology import Topology
from tpray.serving import haproxy
from tpray.serving.progress import Receiver

log = logging.getLogger(__name__)


def catch_signals() -> dict[signal.Signals, Any]:
    """Have SIGTERM and SIGINT raise KeyboardInterrupt; the handlers that were there are returned."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    return {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise KeyboardInterrupt in the main thread.

    SIGINT too, because a shell starts a background job with it ignored.
    """

    before = catch_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` unless ``host:port`` can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port} ({e.strerror or e}): choose another --port or --host") from e


class Server:
    """A running server; use it in a ``with`` block.

    Args:
        config: what to serve.
        host, port: where HTTP listens.
        show: called with each start-up phase of the (first) group.

    Raises:
        TprayError: whatever keeps it from starting; nothing is left running.
    """

    def __init__(self, config: ServeConfig, host: str, port: int, show: Callable[[PhaseReport], None]) -> None:
        self.config, self.host, self.port = config, host, port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._show = show

    def __enter__(self) -> Server:
        config, parallel = self.config, self.config.parallel
        topology = Topology.of(parallel, config.replicas)
        find_model(config.model, topology)  # refuses what cannot work; the replica finds it again, where it runs
        check_port(self.host, self.port)
        from tpray.group.nodes import shortfall
        from tpray.local_ray.local import start_ray

        cores, needed = len(usable_cores()), parallel.tp * topology.threads * config.replicas
        if needed > cores:
            log.warning(
                "%d ranks want %d CPU cores and this machine has %d: they run unpinned and share them",
                parallel.tp * config.replicas, needed, cores,
            )  # fmt: skip
        try:
            folder = Path(tempfile.mkdtemp(prefix="tpray-"))
            set_default_variables(haproxy.settings(folder))
            start_ray(max(cores, needed), folder)
            reason = shortfall(topology)
            if reason is not None:
                raise PlacementError(reason)
            catch_signals()  # Ray has put a handler of its own in their place
            self._deploy(topology)
        except BaseException:
            self._shut_down()
            raise
        return self

    def _deploy(self, topology: Topology) -> None:
        from ray import serve

        from tpray.serving.app import APP_NAME, application

        logging.disable(logging.INFO)  # Serve's greeting; what goes wrong reaches the user as an error
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": self.host, "port": self.port})
        finally:
            logging.disable(logging.NOTSET)
        for name in ("ray", "ray.serve"):  # Serve has just configured them; the rest is in their files
            logging.getLogger(name).setLevel(logging.ERROR)
        receiver = Receiver()
        try:
            target = serve.RunTarget(
                application(self.config, topology, receiver.address), name=APP_NAME, route_prefix="/"
            )
            # Not blocking, so that Ctrl-C need not wait until a large model is up.
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            while not self._is_up():
                self._show_message(receiver.poll(0.2))
            self._wait_until_reachable()
        finally:
            receiver.close()

    def _wait_until_reachable(self, timeout_s: float = 30.0) -> None:
        """HAProxy learns of the replica a moment after Serve has it running."""
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                with urlopen(f"{self.url}/info", timeout=timeout_s):
                    return
            except OSError as e:
                if time.monotonic() > give_up:
                    raise GroupError(f"the model is up, but {self.url} does not answer: {e}") from e
                time.sleep(0.05)

    @staticmethod
    def _is_up() -> bool:
        from ray import serve

        from tpray.serving.app import APP_NAME

        overview = serve.status().applications[APP_NAME]
        if overview.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            lines = (overview.message.strip() or "Serve does not say why").splitlines()
            raise GroupError(f"the application did not start: {lines[-1]}")
        return overview.status == "RUNNING"

    def _show_message(self, message: PhaseReport | TprayError | None) -> None:
        if isinstance(message, TprayError):
            raise message
        if message is not None:
            self._show(message)

    def wait(self) -> None:
        """Block until Ctrl-C or SIGTERM."""
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shut_down()

    @staticmethod
    def _shut_down() -> None:
        from tpray.local_ray.local import stop_ray

        # A second Ctrl-C ends this process at once, and the watchdog the rest.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(130))
        # The whole Ray is ours and goes: taking Serve down first only takes longer, and complains about it.
        stop_ray()


def connect(app: str = "tpray") -> Any:
    """The Serve handle of a server that runs on this machine, for another process than its own.

    ``connect().classify.remote([...]).result()`` gives what `Classifier.classify` returns.

    Args:
        app: the Serve application's name; ``tpray serve`` calls its own ``tpray``.

    Raises:
        ConfigError: no server runs here.
    """
    from ray import serve

    from tpray.local_ray.local import join_ray

    join_ray()
    try:
        return serve.get_app_handle(app)
    except Exception as e:  # Serve raises a class of its own per reason, all of them "there is none"
        raise ConfigError(f"no Serve application {app!r} runs on this machine: start it with `tpray serve`") from e
