"""Start and stop a server on this machine: Ray, Serve and the application, on loopback unless told otherwise."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tpray.artifacts.resolve import Found, locate, recall_or_find
from tpray.artifacts.settle import settle
from tpray.config import (
    API_KEY,
    DRAIN_S,
    LOG_ADDRESS,
    LOG_FORMAT,
    ServeConfig,
    TlsConfig,
    set_default_variables,
    set_variables,
)
from tpray.errors import GroupError, PlacementError, TprayError
from tpray.group.daemon import on_daemon_thread
from tpray.group.phases import LAST_SPAN, PhaseReport, Spans
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.platforms.cores import core_count
from tpray.platforms.lease import SERVER_PORTS, Lease, take_ports
from tpray.platforms.topology import Topology
from tpray.serving import haproxy, telemetry
from tpray.serving.client import get
from tpray.serving.entrance import Entrance
from tpray.serving.log_printer import LogPrinter
from tpray.serving.observing import settings_of
from tpray.serving.progress import Receiver
from tpray.serving.servers import Announcement, ServerRecord
from tpray.serving.signals import catch_signals, end_at_once_if_asked_again

if TYPE_CHECKING:
    from tpray.group.spares import Spares

log = logging.getLogger(__name__)


QUICK_S = 0.3
"""How long Ray's start waits for the model to be found, or refused."""

GONE_S = 60.0
"""How long a server may be without any replica, and Serve unable to start one, before it is given up."""


class Server:
    """A running server; use it in a ``with`` block, whose end waits for the requests that are under way.

    Args:
        config: what to serve.
        host, port: where HTTP listens. tls: with which certificate; None: unencrypted.
        grpc_port: where gRPC listens, on the same host and with the same certificate; None: nowhere.
        show: called with each start-up phase of the (first) group.
        drain_s: how long the end waits for requests, seconds.
        started: when what the user waits for has begun, `time.monotonic`; default: now.

    Raises:
        TprayError: whatever keeps it from starting; nothing is left running.
    """

    def __init__(
        self,
        config: ServeConfig,
        host: str,
        port: int,
        show: Callable[[PhaseReport], None],
        drain_s: float = DRAIN_S,
        started: float | None = None,
        tls: TlsConfig | None = None,
        grpc_port: int | None = None,
    ) -> None:
        self.config, self.entrance = config, Entrance(host, port, tls, grpc_port)
        self.info: dict[str, Any] = {}  # what /info said once the server was up
        self._show, self._drain_s = show, drain_s
        self._spans = Spans(show, started)
        self._ports: Lease | None = None
        self._printer: LogPrinter | None = None
        self._spares: Spares | None = None
        self._announcement: Announcement | None = None
        self._well_at, self._gone, self._complaint = time.monotonic(), "", ""

    def __enter__(self) -> Server:
        from tpray.local_ray.preflight import check_machine

        self._spans.end("import")
        telemetry.check(self.config.telemetry)
        check_machine()  # before anything that takes long, and before there is anything that nobody would remove
        settled = settle(self.config)
        self.config, topology = settled.config, settled.topology
        if settled.why:
            self._spans.end("choose", settled.why)
        self.entrance.check(self.config.access)
        # Refuses what cannot work. A spare imports what it takes to look into a checkpoint, and does so; without spares
        # it is this process. Where finding takes long, Ray starts meanwhile.
        find = recall_or_find if topology.on_assigned_cores else locate
        finding = on_daemon_thread(partial(find, self.config.model, topology), "tpray-find")
        wait([finding], QUICK_S)
        at_once = finding.done()
        if at_once:
            finding.result()
            self._spans.end("find", "the model")

        cores, needed = core_count(), topology.tp * topology.threads * settled.replicas
        from tpray.local_ray import local  # noqa: F401  # before there is anything to end, for that needs it whole

        try:
            self._start_ray(max(cores, needed))
            found = finding.result()
            if not at_once:
                self._spans.end("find", "the model")
            self._deploy(topology, settled.replicas, found)
            self._announce()
        except BaseException:
            self._shut_down()
            raise
        return self

    def _start_ray(self, cpus: int) -> None:
        """Start a Ray whose ports are this server's own."""
        threading.Thread(target=_import_routes, name="tpray-import", daemon=True).start()
        from tpray.local_ray.local import start_ray
        from tpray.local_ray.preflight import make_folder
        from tpray.ray_private import connect_only_when_told

        self._ports = take_ports(haproxy.PORTS, SERVER_PORTS)
        folder = make_folder()
        timeout_s = self.config.batch.request_timeout_s
        set_variables(self.entrance.places(folder, self._ports.ids, timeout_s))
        self._printer = LogPrinter()
        set_variables({LOG_ADDRESS: self._printer.address, LOG_FORMAT: settings_of(self.config.telemetry).form})
        set_variables({API_KEY: None})  # it is among the configuration's, and no other process needs it
        at, most = self.entrance, self.config.batch.payload_limit_bytes
        set_default_variables(haproxy.settings(timeout_s) | haproxy.grpc_settings(at.grpc_port, most))
        start_ray(cpus, folder, self._ports)
        connect_only_when_told()
        catch_signals()  # Ray has put a handler of its own in their place
        self._spans.end("Ray")

    def _deploy(self, topology: Topology, replicas: int, found: Found) -> None:
        from ray import serve

        from tpray.group.nodes import shortfall
        from tpray.group.spares import Spares, answer
        from tpray.serving import prepare

        if reason := shortfall(topology):
            raise PlacementError(reason)
        self._spares = spares = Spares(topology, replicas)  # kept: Ray ends actors that nobody refers to
        described = None
        if isinstance(found, Checkpoint) and spares.names:
            described = spares.ask(prepare.check_and_describe, found, self.config.model, topology)
            spares.prepare_to_trace()
        from tpray.serving.app import APP_NAME, FromCommand, application

        self._start_serve()
        self._spans.end("Serve")
        task = None if described is None else answer(described)
        if task is not None:
            spares.ask(prepare.learn_tokenizer, task)
            self._spans.end("describe", "the model")
        receiver = Receiver()
        try:
            spans = tuple(self._spans.reports)
            told = FromCommand(
                receiver.address, self.entrance.token, self.entrance.key_digest, spares.names, task, spans
            )
            app = application(self.config, topology, told)
            # Not blocking, so that Ctrl-C need not wait until a large model is up.
            serve.run_many(
                [serve.RunTarget(app, name=APP_NAME, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            waiting = replicas
            while waiting:
                message = receiver.poll(1.0)
                waiting -= isinstance(message, PhaseReport) and message.name == LAST_SPAN
                self._show_message(message)
                if message is None and self._is_up():
                    break
            if replicas > 1:  # they start side by side, so that their lines do not add up, and this one does
                while not self._is_up():
                    time.sleep(0.1)
                self._spans.end("groups", f"all {replicas}")
            self._wait_until_reachable()
            self._spans.end("HAProxy")
            spares.end()
        finally:
            receiver.close()

    def _start_serve(self) -> None:
        from ray import serve

        from tpray.local_ray.local import quiet_logs

        at = self.entrance
        logging.disable(logging.INFO)  # Serve's greeting; what goes wrong reaches the user as an error
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": at.serve_host, "port": at.port},
                grpc_options=haproxy.grpc_options(at.grpc_port),
            )
        except Exception as e:  # of Ray's actors, or of Serve's own checks of them
            raise GroupError(f"Ray Serve did not start: {_reason(e)}") from e
        finally:
            logging.disable(logging.NOTSET)
        quiet_logs()  # the rest is in their files

    def _wait_until_reachable(self, timeout_s: float = 30.0) -> None:
        """HAProxy learns of the replica a moment after Serve has it running."""
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                self.info = self.ask_info(timeout_s)
                return
            except (OSError, ValueError) as e:
                if time.monotonic() > give_up:
                    raise GroupError(f"the model is up, but {self.entrance.url} does not answer: {e}") from e
                time.sleep(0.02)

    def ask_info(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """What ``GET /info`` says, whoever else may ask.

        Raises:
            OSError, ValueError: it is not answered.
        """
        with get(f"{self.entrance.url}/info", timeout_s, self.entrance.key, self.entrance.context) as answer:
            info: dict[str, Any] = json.load(answer)
            return info

    @staticmethod
    def _is_up() -> bool:
        overview = _application()
        if overview.status in FAILED:
            raise GroupError(f"the application did not start: {_last_line(overview)}")
        return bool(overview.status == "RUNNING")

    def _show_message(self, message: PhaseReport | TprayError | None) -> None:
        if isinstance(message, TprayError):
            raise message
        if message is None:
            return
        if message.done and self.config.replicas == 1:
            self._spans.take(message)
        else:
            self._show(message)

    def _announce(self) -> None:
        """Say to whoever asks on this machine where this server is; see `tpray.connect`."""
        named = self.config.model.source or "the embedded demo"
        address = str(self.info.get("ray_address"))
        self._announcement = Announcement(ServerRecord(self.entrance.url, address, named, os.getpid()))

    def wait(self) -> None:
        """Block until Ctrl-C or SIGTERM.

        Raises:
            GroupError: the server is gone for good: Ray has ended, or no replica could be started for `GONE_S`.
        """
        over = threading.Event()
        self._well_at, self._gone = time.monotonic(), ""
        threading.Thread(target=self._watch, args=(over,), name="tpray-watch", daemon=True).start()
        try:
            while not self._gone:
                time.sleep(2)
                self._look()
                self.entrance.renew()
        except KeyboardInterrupt:
            if not self._gone:
                return
        finally:
            over.set()
        raise GroupError(f"the server is gone: {self._gone}")

    def _look(self) -> None:
        """Note whether the application is well. It may block; it is in the main thread, since it can start a Ray."""
        self._complaint = "Ray Serve does not answer"
        try:
            overview = _application()
        except Exception as e:  # noqa: BLE001  # whatever Ray raises, it is no answer
            self._complaint = f"Ray Serve does not answer ({type(e).__name__})"
            return
        running = any(deployment.replica_states.get("RUNNING") for deployment in overview.deployments.values())
        if running or overview.status not in FAILED:
            self._well_at = time.monotonic()
        else:
            self._complaint = f"no replica could be started for {GONE_S:g} s: {_last_line(overview)}"

    def _watch(self, over: threading.Event) -> None:
        """Interrupt `wait` once Ray has ended, or the application was not well for too long. On a thread of its own."""
        from tpray.local_ray.local import dead_process

        main = threading.main_thread().ident
        assert main is not None, "it runs"
        while not over.wait(1):
            if dead := dead_process():
                self._gone = f"Ray's {dead} has ended; its logs are in Ray's session folder"
            elif time.monotonic() - self._well_at > GONE_S:
                self._gone = self._complaint
            if self._gone and not over.is_set():
                signal.pthread_kill(main, signal.SIGINT)
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_at_once_if_asked_again()
        if self._announcement is not None:
            self._announcement.close()
        if not isinstance(error, TprayError):
            self._drain()
        self._shut_down()

    def _drain(self) -> None:
        """Have the replicas take no new work, and wait until they have answered what is under way.

        On a thread: where the signal went to Ray's processes too, and they have ended, the call would wait for them.
        """
        from tpray.local_ray.local import dead_process

        draining = threading.Thread(target=self._ask_to_drain, name="tpray-drain", daemon=True)
        draining.start()
        give_up = time.monotonic() + self._drain_s + 5
        while draining.is_alive() and dead_process() is None and time.monotonic() < give_up:
            draining.join(0.1)
        time.sleep(0.05)  # HAProxy passes the last answers on

    def _ask_to_drain(self) -> None:
        from ray import serve

        from tpray.ray_private import by_reference
        from tpray.serving.app import APP_NAME

        try:
            handle = by_reference(serve.get_app_handle(APP_NAME), through_ray=True)
            left = handle.broadcast("drain", self._drain_s).results(timeout_s=self._drain_s + 5)
        except Exception as e:  # noqa: BLE001  # a server that is broken has nothing to wait for
            log.info("nothing was waited for: %r", e)
            return
        if any(left):
            log.warning("%d requests were not answered within %g s", sum(left), self._drain_s)

    def _shut_down(self) -> None:
        end_at_once_if_asked_again()
        from tpray.local_ray.local import stop_ray

        # The whole Ray is ours and goes: taking Serve down first only takes longer, and complains about it.
        stop_ray()
        if self._printer is not None:
            self._printer.close()
        if self._ports is not None:
            self._ports.release()


def _import_routes() -> None:
    """While Ray starts, import what the application needs of others than Ray."""
    import tpray.serving.http  # noqa: F401


FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
"""States of a Serve application without what it needs."""


def _application() -> Any:
    """What Serve says of our application: a ``ray.serve.schema.ApplicationStatusOverview``."""
    from ray import serve

    from tpray.serving.app import APP_NAME

    return serve.status().applications[APP_NAME]


def _reason(error: Exception) -> str:
    """What was raised, and not where, which Ray puts before it; the first line and the last of several."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else type(error).__name__


def _last_line(overview: Any) -> str:
    return str((overview.message.strip() or "Serve does not say why").splitlines()[-1])
