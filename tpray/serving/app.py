"""The Ray Serve deployment: one replica owns one tensor-parallel group.

`build` is the application builder that Serve config files name (``import_path: tpray.serving.app:build``). The
replica's placement group holds the ranks' cores, and the replica itself takes none. Its routes are in
`tpray.serving.http`.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from tpray.artifacts.resolve import TraceTask
from tpray.artifacts.settle import settle
from tpray.config import AUTO, AccessConfig, BatchConfig, ServeConfig, stay_quiet
from tpray.group.classifier import ClassifierGroup
from tpray.group.executor import Executor
from tpray.group.nodes import STRATEGY, wait_for_node
from tpray.group.phases import PhaseReport, Spans
from tpray.group.ray_executor import RayExecutor
from tpray.platforms.topology import Topology
from tpray.ray_private import ask_all, by_reference, keep_replica_on_loopback, request_id, serve_listens
from tpray.serving import progress, telemetry, upgrades
from tpray.serving.access import Access, check_host
from tpray.serving.answers import rendered
from tpray.serving.autoscaling import autoscaling_stats, scaling_options
from tpray.serving.chunks import Chunks
from tpray.serving.codec import Direction
from tpray.serving.dialects.base import CLIENT_LEFT, Rendered
from tpray.serving.dialects.tei import render_error
from tpray.serving.engine import Engine
from tpray.serving.entities import Strategy
from tpray.serving.gate import Gate
from tpray.serving.http import make_app
from tpray.serving.keys import KeyRing
from tpray.serving.load import HANDLE
from tpray.serving.model_names import ModelNames
from tpray.serving.model_router import Asked, ask_app
from tpray.serving.observer import Observer
from tpray.serving.observing import serve_logging, set_up_logs, watch_methods
from tpray.serving.oip.service import OpenInferenceService
from tpray.serving.one_write import join_writes
from tpray.serving.ray_metrics import RayMetrics
from tpray.serving.scores import Activation, Scoring
from tpray.serving.scrape import OTHERS_S, Others, Scrape, Snapshot
from tpray.serving.tagging import Tagging, tag
from tpray.serving.waiting import ClientLeftError
from tpray.tokenizer import as_items

log = logging.getLogger(__name__)

APP_NAME = "tpray"
DEPLOYMENT_NAME = "Classifier"


@dataclass(frozen=True)
class FromCommand:
    """What `tpray serve` tells the replicas of its server.

    progress_address: where they report their start; see `progress`. token: what HTTP requests must show; see `gate`.
    key_digest: SHA-256, hexadecimal, of the key with which the command asks where keys are asked for. spares: names of
    processes that wait for the first ranks; see `tpray.group.spares`. task: what the model was found as, if it was not
    traced before. before: the spans of the start until now.
    """

    progress_address: str | None = None
    token: str | None = None
    key_digest: str | None = None
    spares: tuple[str, ...] = ()
    task: TraceTask | None = None
    before: tuple[PhaseReport, ...] = ()


class Classifier(OpenInferenceService):
    """One replica: one group, its queue, and the routes."""

    # Serve awaits an async constructor; the language does not know that.
    async def __init__(  # type: ignore[misc]
        self,
        config: ServeConfig,
        told: FromCommand,
        why: str = "",
    ) -> None:
        set_up_logs(config.telemetry, request_id)
        keep_replica_on_loopback()
        join_writes()
        self._config = config
        self._gate = Gate(told.token)
        self._own_handle: Any = None  # made by the first that asks for metrics
        report = progress.Sender(told.progress_address)
        # A replica that comes later looks for itself: the model's files may be others by then.
        before, task = (told.before, told.task) if report.heard else ((), None)
        spans = Spans(report.phase, before[-1].ended if before else None)
        spans.end("replica")
        try:
            self._observer = Observer.of(config.telemetry, request_id)
            self._access = Access.of(config.access, told.key_digest)
            await _check_host(config.access, self._access.keys, own_ports=told.token is not None)
            # Of this machine, which need not be the one where the application was built.
            executor = self.executor(Topology.of(config.parallel, why=why), told.spares)
            group = ClassifierGroup(config.model, executor, config.batch.step_timeout_s, report.phase, task)
            self._engine = Engine(group, config.batch)
            await self._engine.start()
            names = ModelNames(config.served_model_name, self._engine.codec.record.source)
            self.open_service(self._engine, self._gate, names, self._access)
            report.phase(self._engine.startup[-1])
            self._engine.startup = (*before, *spans.reports, *self._engine.startup)
        except Exception as e:
            report.failed(e)
            raise
        address = ray.get_runtime_context().gcs_address
        # Of a file there may be another number by now, without a restart of this replica.
        groups = config.replicas if told.progress_address is not None and config.replicas != AUTO else None
        own = serve.get_replica_context().replica_id.unique_id
        self._scrape = Scrape(
            self._engine, self._gate, self._access.keys, names.listed[0], own, None if groups == 1 else self._ask_others
        )
        named, release = config.served_model_name, config.release
        door = make_app(self._engine, self._gate, address, named, self._access, groups, self._scrape, release=release)
        self._app: ASGIApp = door
        if self._observer is not None:
            self._app = self._observer.app(door, door.route_of)
            watch_methods(self, self._observer)
        if told.token is None:  # the Ray of `tpray serve` exports nothing
            self._telling = asyncio.create_task(RayMetrics(self._scrape.own).tell_again_and_again())

    @staticmethod
    def executor(topology: Topology, spares: Sequence[str]) -> Executor:
        """What starts the ranks; a replica of another kind has others. spares: as for `RayExecutor`."""
        return RayExecutor(topology, spares)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve's hook: the routes, once the constructor is done."""
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:  # one that is not async is called in a thread
        """Serve's hook for ``user_config``: keys of `BatchConfig`, changed without a restart.

        Raises:
            pydantic.ValidationError: a key is unknown or out of range.
        """
        batch = BatchConfig.model_validate(self._config.batch.model_dump() | user_config)
        self._config = self._config.model_copy(update={"batch": batch})
        self._engine.reconfigure(batch)

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """For the time of one call of a Python handle; it is counted with the status that it would have over HTTP."""
        started, status = time.perf_counter(), CLIENT_LEFT
        error: Exception | None = ClientLeftError()
        try:
            with self._gate.enter():
                yield
            status, error = 200, None
        except Exception as e:
            status, error = render_error(e).status, e
            raise
        finally:
            self._engine.load.answered(HANDLE, status, "", time.perf_counter() - started, error)

    async def classify(
        self,
        inputs: Any,
        raw_scores: bool = False,
        truncate: bool = False,
        truncation_direction: Direction | None = None,
        chunks: Any = None,
        activation: Activation | None = None,
        top_k: int | None = None,
        traceparent: str | None = None,
    ) -> list[Any]:
        """What a Python handle calls.

        Args:
            traceparent: W3C's, of the span that the call belongs to, here and of the other methods; `tpray.connect`
                gives that of its caller.
            inputs: a text, a pair as a tuple, a conversation (``[{"role", "content"}, ...]`` or ``{"messages":
                [...]}``), or a list of these. (Over HTTP, where there are no tuples, a list of two texts is a pair;
                here it is a batch of two.)
            chunks, activation, top_k: as for `LocalClassifier.classify`.

        Returns:
            ``[{"label", "score"}, ...]``, best first, for one item; a list of those for a list.
        """
        with self._taken():
            items, single = as_items(inputs)
            answer = await self._engine.classify(
                items,
                Scoring.of(raw_scores, activation, top_k),
                truncate,
                truncation_direction,
                chunks=Chunks.of(chunks),
            )
        rows = answer.rendered()
        return rows[0] if single else rows

    async def classify_tokens(
        self,
        texts: str | Sequence[str],
        aggregation_strategy: Strategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        raw_scores: bool = False,
        truncate: bool = False,
        traceparent: str | None = None,
    ) -> list[Any]:
        """What a Python handle calls: entities, as `LocalClassifier.classify_tokens` gives them."""
        single = isinstance(texts, str)
        with self._taken():
            how = Tagging(aggregation_strategy, ignore_labels, raw_scores, truncate)
            answer = await tag(self._engine, [texts] if isinstance(texts, str) else list(texts), how)
        return answer.entities[0] if single else answer.entities

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        return_documents: bool = False,
        raw_scores: bool = False,
        truncate: bool = True,
        chunks: Any = None,
        traceparent: str | None = None,
    ) -> list[dict[str, Any]]:
        """What a Python handle calls: ``[{"index", "score"}, ...]``, as `LocalClassifier.rerank` gives them."""
        with self._taken():
            documents = list(documents)
            ranking = await self._engine.rerank(
                query, documents, Scoring.of(raw_scores, top_k=top_n), truncate, chunks=Chunks.of(chunks)
            )
        return rendered(ranking.documents, documents if return_documents else None)

    async def answer(self, asked: Asked) -> Rendered:
        """Answer an HTTP request that the deployment in front of several models passes on; see `models`."""
        return await ask_app(self._app, asked)

    async def snapshot(self) -> Snapshot:
        """The metrics of this replica, for another one that is asked for those of all."""
        return await self._scrape.own()

    async def _ask_others(self) -> Others:
        """All replicas that Serve knows of, this one among them."""
        if self._own_handle is None:
            context = serve.get_replica_context()
            handle = await asyncio.to_thread(serve.get_deployment_handle, context.deployment, context.app_name)
            self._own_handle = by_reference(handle, through_ray=True)
        try:
            return Others(*await ask_all(self._own_handle, "snapshot", OTHERS_S))
        except (RayError, RayServeException) as e:
            log.warning("the metrics of other replicas are not known: %s", e)
            return Others((), 1)

    async def drain(self, limit_s: float) -> int:
        """Take no new work, and wait until what is under way is answered; how many requests are left at the limit."""
        left = await self._gate.close(limit_s)
        if self._observer is not None:
            await self._observer.flush()
        return left

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what `autoscaling.TokenBacklog` decides by."""
        return autoscaling_stats(self._engine)

    async def check_health(self) -> None:
        """Serve's check: fails, and has this replica replaced, once its group was given up."""
        self._engine.check_alive()

    async def __del__(self) -> None:
        engine = getattr(self, "_engine", None)  # __init__ may have failed before it was there
        if engine is not None:
            await engine.stop()
        observer = getattr(self, "_observer", None)
        if observer is not None:
            await observer.close()


async def _check_host(config: AccessConfig, keys: KeyRing, own_ports: bool) -> None:
    """Refuse to answer others on the network without a key, wherever Serve listens.

    Args:
        own_ports: `tpray serve` has seen to the addresses; of its own accord Serve's gRPC listens on all of them.

    Raises:
        ConfigError: see `tpray.serving.access.check_host`.
    """
    host, grpc = await serve_listens()
    remedy = (
        "set TPRAY_API_KEY on every node, or `access: {keys_file: FILE}` among the application's args; or, if "
        "whoever reaches the port may ask, `access: {insecure_no_key: true}`"
    )
    if host is not None:
        check_host(host, config, keys, "http_options.host", remedy)
    if not own_ports and grpc:
        check_host("::", config, keys, "grpc_options, for which Serve listens on", remedy)


def build(args: ServeConfig) -> serve.Application:
    """The Serve application.

    Args:
        args: from a Serve config file, where every key may be left out; Serve validates it by this annotation.

    Raises:
        As `application_of`.
    """
    return application_of(args)


def application_of(args: ServeConfig, name: str = DEPLOYMENT_NAME, behind: bool = False) -> serve.Application:
    """A deployment of a configuration, by itself an application; see `application`.

    Raises:
        TprayError: the model, the cores, the memory or the runtime do not agree with the configuration.
        PlacementError: no node of the cluster can hold a group, and none that could is coming; see `wait_for_node`.
    """
    stay_quiet()
    telemetry.check(args.telemetry)
    settled = settle(args, runs_here=False)
    args, topology = settled.config, settled.topology
    if ray.is_initialized():  # not so for `serve build`, which writes a file and starts nothing
        wait_for_node(topology, args.node_labels)
        upgrades.say_what_comes(name, topology, args)
    return application(args, topology, name=name, behind=behind)


def __getattr__(name: str) -> serve.Application:
    """``app``: the application of the embedded demo, for `serve build`, which takes an application and no builder."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build(ServeConfig())


def application(
    config: ServeConfig,
    topology: Topology,
    told: FromCommand | None = None,
    name: str = DEPLOYMENT_NAME,
    behind: bool = False,
    kind: type[Classifier] = Classifier,
) -> serve.Application:
    """The Serve application of a configuration.

    Args:
        topology: of each group, as it is where this is called.
        told: by the command, if it is one that makes the application.
        name: of the deployment. behind: whether requests come to another, which passes them on.
        kind: of the replicas; one with other ranks, say.
    """
    # Fixed here and not in each replica: on another machine "all cores" would be another number.
    resolved = {"cores_per_rank": topology.cores_per_rank, "runtime": topology.runtime}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=resolved)})
    # An application has one deployment that HTTP requests come to; several models are behind that.
    deployable: Any = serve.deployment(kind if behind else serve.ingress()(kind))
    deployment = deployable.options(
        name=name,
        **scaling_options(config),
        ray_actor_options={"num_cpus": 0},
        logging_config=serve_logging(config.telemetry),
        placement_group_bundles=[topology.resources()],
        placement_group_bundle_label_selector=[config.node_labels] if config.node_labels else None,
        placement_group_strategy=STRATEGY,
        max_surge_percent=100 if config.upgrade == "side-by-side" else 0,
        # Admission is the batcher's, whose limit answers 429; Serve's own must not come first.
        max_ongoing_requests=1_000_000,
        health_check_period_s=2,
        health_check_timeout_s=10,
        # A replica that is replaced answers what it has taken.
        graceful_shutdown_timeout_s=config.batch.request_timeout_s + 5,
    )
    made = upgrades.replaceable(deployment, upgrades.version_of(config))
    bound: serve.Application = made.bind(config, told or FromCommand(), topology.why)
    return bound
