"""The Ray Serve deployment and its HTTP routes. The path of a request starts here.

`build` is the application builder that Serve config files name (``import_path: tpray.serving.app:build``). One
replica owns one tensor-parallel group: its placement group holds the ranks' cores, and the replica itself
takes none.
"""

# No `from __future__ import annotations` here: FastAPI reads the routes' annotations from a class that Serve has
# shipped by value, where the names in them are not to be found again.

import logging
from collections.abc import Sequence
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from ray import serve
from starlette.exceptions import HTTPException
from swagger_ui_bundle import swagger_ui_path

from tpray import __version__
from tpray.config import BatchConfig, ServeConfig, log_level, stay_quiet
from tpray.errors import PayloadTooLargeError
from tpray.group.cluster import keep_replica_on_loopback
from tpray.group.group import ShardGroup
from tpray.group.placement import STRATEGY, Layout, wait_for_node
from tpray.group.ranks import RayRanks
from tpray.group.store import Source, check_neuron
from tpray.serving import progress, tei
from tpray.serving.autoscaling import METRIC
from tpray.serving.engine import Engine
from tpray.serving.text import Direction, Item

log = logging.getLogger("tpray.app")

APP_NAME = "tpray"
DEPLOYMENT_NAME = "Classifier"

api = FastAPI(
    title="tpray",
    version=__version__,
    summary="Sequence classification on a tensor-parallel group.",
    docs_url=None,  # FastAPI's own page loads its script from a CDN; ours carries it
    redoc_url=None,
)
api.mount("/docs/assets", StaticFiles(directory=swagger_ui_path), name="docs-assets")

_ERROR = {"model": tei.ErrorResponse}


@api.exception_handler(Exception)
@api.exception_handler(HTTPException)
async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such route, or not with this method
        body = tei.ErrorResponse(error=str(error.detail), error_type="Validation").model_dump_json()
        return Response(body, error.status_code, media_type="application/json", headers=dict(error.headers or {}))
    return _failure(error)


def _failure(error: Exception) -> Response:
    status, body, headers = tei.render_error(error)
    if status == 424:
        log.exception("a request failed", exc_info=error)
    return Response(body, status, dict(headers), media_type="application/json")


@api.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The interactive documentation."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="tpray",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon-32x32.png",
    )


# Serve ships the class below by value, as it is when it is decorated: what it calls comes before it.


async def _body(request: Request, limit_bytes: int) -> bytes:
    """The request's body, given up as soon as it is known to exceed the limit."""
    too_large = PayloadTooLargeError(f"the body is larger than {limit_bytes} bytes: send smaller batches")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


@serve.deployment(name=DEPLOYMENT_NAME)
@serve.ingress(api)
class Classifier:
    """One replica: one group, its queue, and the routes."""

    # Serve awaits an async constructor; the language does not know that.
    async def __init__(self, config: ServeConfig, progress_address: str | None = None) -> None:  # type: ignore[misc]
        logging.getLogger("tpray").setLevel(log_level())
        keep_replica_on_loopback()
        self._config = config
        parallel = config.parallel
        source = Source.of(config.model, parallel)
        report = progress.Sender(progress_address)
        ranks = RayRanks(Layout.of(parallel))
        group = ShardGroup(source, ranks, config.batch.step_timeout_s, report.phase)
        self._engine = Engine(group, config.batch)
        try:
            await self._engine.start()
        except Exception as e:
            report.failed(e)
            raise
        self._startup = [(p.name, round(p.seconds, 3), p.note) for p in group.phases]

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's hook for ``user_config``: keys of `BatchConfig`, changed without a restart.

        Raises:
            pydantic.ValidationError: a key is unknown or out of range.
        """
        batch = BatchConfig.model_validate(self._config.batch.model_dump() | user_config)
        self._config = self._config.model_copy(update={"batch": batch})
        self._engine.reconfigure(batch)

    async def classify(
        self,
        inputs: Item | Sequence[Item],
        raw_scores: bool = False,
        truncate: bool = False,
        truncation_direction: Direction = "Right",
    ) -> list[Any]:
        """What a Python handle calls.

        Args:
            inputs: a text, a pair as a tuple, or a list of texts and pairs. (Over HTTP, where there are no
                tuples, a list of two texts is a pair; here it is a batch of two.)

        Returns:
            ``[{"label", "score"}, ...]``, best first, for one text or pair; a list of those for a list.
        """
        single = isinstance(inputs, (str, tuple))
        items: list[Item] = [inputs] if isinstance(inputs, (str, tuple)) else list(inputs)
        answer = await self._engine.classify(items, raw_scores, truncate, truncation_direction)
        rows = [[{"label": s.label, "score": s.score} for s in scores] for scores in answer.scores]
        return rows[0] if single else rows

    @api.post(
        "/predict",
        response_model=list[tei.Prediction] | list[list[tei.Prediction]],
        responses={status: _ERROR for _, status, _ in tei.ERRORS},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": tei.PredictRequest.model_json_schema()}},
            }
        },
    )
    async def predict(self, request: Request) -> Response:
        """Score every label for a text, a pair or a batch, best first (TEI's dialect)."""
        try:
            asked = tei.parse(await _body(request, self._config.batch.payload_limit_bytes))
            items, batch = tei.items_of(asked)
            answer = await self._engine.classify(items, asked.raw_scores, asked.truncate, asked.truncation_direction)
        except Exception as e:  # noqa: BLE001  # the one boundary where errors become statuses
            return _failure(e)
        return Response(tei.render(answer, batch), 200, tei.timing_headers(answer), "application/json")

    @api.get("/health", responses={503: _ERROR})
    async def health(self) -> Response:
        """200 when every rank has just answered a step, else 503."""
        try:
            await self._engine.check()
        except Exception as e:  # noqa: BLE001  # as above
            return _failure(e)
        return Response(status_code=200)

    @api.get("/info")
    async def info(self) -> dict[str, Any]:
        """The model, how it is split, the limits, and how the group came up."""
        group = self._engine.group
        assert group.artifact is not None, "a started engine has an artifact"
        manifest = group.artifact.manifest
        model, limits = manifest.model, self._config.batch
        return {
            "model_id": model.source,
            "model_sha": model.revision,
            "model_digest": model.digest,
            "model_type": model.model_type,
            "problem_type": model.problem_type,
            "labels": model.labels,
            "model_dtype": manifest.dtype,
            "tp_degree": manifest.tp,
            "runtime": manifest.runtime,
            "max_input_length": self._engine.codec.max_length,
            "max_batch_tokens": limits.max_batch_tokens,
            "max_concurrent_requests": limits.max_concurrent_requests,
            "max_client_batch_size": limits.max_client_batch_size,
            "payload_limit": limits.payload_limit_bytes,
            "version": __version__,
            "versions": manifest.versions,
            "parity": group.parity,
            "artifact": str(group.artifact.directory),
            "traced_now": group.traced,
            "restarts": self._engine.restarts,
            "ranks": [
                {
                    "rank": info.rank,
                    "pid": info.pid,
                    "cores": info.cores,
                    "threads": info.threads,
                    "sharded_bytes": record.sharded_bytes,
                    "replicated_bytes": record.replicated_bytes,
                }
                for info, record in zip(group.infos, manifest.ranks, strict=True)
            ],
            "startup": [{"phase": n, "seconds": s, "note": note} for n, s, note in self._startup],
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what `autoscaling.TokenBacklog` decides by."""
        return {METRIC: float(self._engine.queued_tokens)}

    async def check_health(self) -> None:
        """Serve's check: fails, and has this replica replaced, once its group was given up."""
        self._engine.check_alive()

    async def __del__(self) -> None:
        engine = getattr(self, "_engine", None)  # __init__ may have failed before it was there
        if engine is not None:
            await engine.stop()


def build(args: ServeConfig) -> serve.Application:
    """The Serve application.

    Args:
        args: from a Serve config file, where every key may be left out; Serve validates it by this annotation.

    Raises:
        DegreeError, ConfigError: the family's NeuronCores have no such degree, or the runtime does not know them.
        PlacementError: no node of the cluster can hold a group, and none that could is coming; see `wait_for_node`.
    """
    stay_quiet()
    check_neuron(Source.of(args.model, args.parallel))
    if ray.is_initialized():  # not so for `serve build`, which writes a file and starts nothing
        wait_for_node(Layout.of(args.parallel, args.replicas))
    return application(args)


def __getattr__(name: str) -> serve.Application:
    """``app``: the application of the embedded demo, for `serve build`, which takes an application and no builder."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build(ServeConfig())


def _scale(config: ServeConfig) -> dict[str, Any]:
    """How many replicas: Serve's options."""
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.replicas}
    policy = serve.config.AutoscalingPolicy(
        policy_function="tpray.serving.autoscaling:TokenBacklog",
        policy_kwargs={"backlog_tokens": scaling.backlog_tokens},
    )
    return {
        "autoscaling_config": serve.config.AutoscalingConfig(
            **scaling.model_dump(exclude={"backlog_tokens"}),
            initial_replicas=scaling.min_replicas,
            metrics_interval_s=min(10.0, scaling.look_back_period_s / 2),
            policy=policy,
        )
    }


def application(config: ServeConfig, progress_address: str | None = None) -> serve.Application:
    """The Serve application of a configuration, reporting its start to ``progress_address`` if there is one."""
    layout = Layout.of(config.parallel, config.replicas)
    # Fixed here and not in each replica: on another machine "all cores" would be another number.
    parallel = config.parallel.model_copy(update={"cores_per_rank": layout.width, "runtime": layout.runtime})
    config = config.model_copy(update={"parallel": parallel})
    deployable: Any = Classifier  # a serve.Deployment, which the decorators' types do not say
    deployment = deployable.options(
        **_scale(config),
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[layout.bundle()],
        placement_group_strategy=STRATEGY,
        # Admission is the batcher's, whose limit answers 429; Serve's own must not come first.
        max_ongoing_requests=4 * config.batch.max_concurrent_requests,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=20,
    )
    bound: serve.Application = deployment.bind(config, progress_address)
    return bound
