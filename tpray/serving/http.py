"""The HTTP routes of one replica, over its engine: the dialects', and those about the server itself. No Ray."""

from __future__ import annotations

import time
from dataclasses import asdict
from os import getpid
from socket import gethostname
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Match, Route

from tpray.artifacts.manifest import ModelRecord
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving import live
from tpray.serving.access import Access
from tpray.serving.dialects import DIALECTS
from tpray.serving.dialects.base import Answering, Handler, as_response
from tpray.serving.door import Door, SharedDoor
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.keys import ASKING
from tpray.serving.metrics import read_figures
from tpray.serving.scrape import PATH as METRICS_PATH
from tpray.serving.scrape import Scrape
from tpray.serving.tokenizer_threads import TOKENIZER_THREADS
from tpray.serving.web import add_pages
from tpray.version import __version__

JSON: dict[str, Any] = {"application/json": {}}


def make_app(
    engine: Engine,
    gate: Gate | None = None,
    ray_address: str | None = None,
    served: tuple[str, ...] = (),
    access: Access | None = None,
    groups: int | None = 1,
    scrape: Scrape | None = None,
    release: str | None = None,
) -> Door:
    """The routes of an engine that has started; all requests come through ``gate``.

    Args:
        access: who may ask; None: everybody.
        ray_address: of the Ray that this runs on, for `tpray.connect`.
        served: what requests may call the model; see `ModelNames`.
        groups: how many the server has, each with an app of its own; None: that changes.
        scrape: of all of them; default: of this engine alone.
        release: what the operator calls this version.
    """
    app = FastAPI(
        title="tpray",
        version=__version__,
        summary="Classification of texts and tokens on a tensor-parallel group.",
        docs_url=None,  # FastAPI's own page loads its script from a CDN
        redoc_url=None,
    )
    add_pages(app)
    own = DIALECTS[0]

    gate, made, access = gate or Gate(), Answering(engine, served), access or Access()
    scraped = scrape or Scrape(engine, gate, access.keys, made.names.listed[0])

    def whole() -> dict[str, Any]:
        now = engine.load.now
        return describe(engine) | {
            "release": release,
            "inputs": made.accepts,
            "group": {"host": gethostname(), "pid": getpid(), "groups": groups},
            "load": live.load_of(engine, gate, now - live.RECENT_S, now),
            "ray_address": ray_address,
        }

    @app.exception_handler(Exception)
    @app.exception_handler(HTTPException)
    async def on_error(request: Request, error: Exception) -> Response:
        status, path = getattr(error, "status_code", 0), request.url.path
        if status == 404:
            error = HTTPException(status, f"there is no {path} here: /docs shows what there is")
        if status == 405:  # starlette names the methods of the first route of the path alone
            routes = [*app.routes, *(route for _, routes in spoken for route in routes)]
            here = (r for r in routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE)
            taken = ", ".join(sorted({method for route in here for method in route.methods or ()}))
            said = f"{path} takes {taken}, and not {request.method}: /docs shows what there is"
            error = HTTPException(status, said, {"allow": taken})
        return as_response(own.answer_error(error))

    ill: dict[int | str, dict[str, Any]] = {
        503: {"description": "a rank does not answer, or the group restarts", "content": JSON}
    }

    @app.head("/health", include_in_schema=False)
    @app.head("/ping", include_in_schema=False)
    @app.get("/health", response_class=Response, responses=ill)  # without a body
    @app.get("/ping", response_class=Response, responses=ill)
    async def health(
        deep: Annotated[
            str | None, Query(description="also compare the logits of a fixed input; `?deep` will do")
        ] = None,
    ) -> Response:
        """200 when every rank has just answered a step, and with `?deep` answered it as it should; else 503."""
        try:
            if deep is None or deep.lower() in ("0", "false", "no"):
                await engine.check()
            else:
                await engine.check_deeply()
        except Exception as e:  # noqa: BLE001  # the boundary where errors become statuses
            return as_response(own.answer_error(e))
        return Response(status_code=200)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The model, how it is split, the limits, the load, and how the group came up."""
        return whole()

    @app.head(METRICS_PATH, include_in_schema=False)
    @app.get(METRICS_PATH, response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """The metrics of all groups and ranks, for Prometheus; as OpenMetrics for who accepts that."""
        body, kind = await scraped.render(request.headers.get("accept", ""))
        return Response(b"" if request.method == "HEAD" else body, headers={"content-type": kind})

    handlers, spoken = dict[str, Handler](), []
    for dialect in DIALECTS:
        answering = dialect.handlers(made)
        routers = [dialect.routes(answering)]
        if dialect.pages is not None:
            routers.append(dialect.pages(made))
        for router in routers:
            app.include_router(router)
        handlers |= answering
        spoken.append((dialect, [route for router in routers for route in router.routes]))
    if access.keys:
        _document_key(app)
    kind = SharedDoor if access.origins else Door
    streams = {live.PATH: live.Live(engine, gate, whole, own)}
    return kind(app, handlers, gate, spoken, access, streams, engine.load)


def _document_key(app: FastAPI) -> None:
    """Say in the OpenAPI document that a key is asked for, so that whoever reads it at ``/docs`` can give one there."""

    def openapi() -> dict[str, Any]:
        found = FastAPI.openapi(app)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found | {"security": [{"key": []}]}

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it


def describe(engine: Engine) -> dict[str, Any]:
    """What ``GET /info`` says: TEI's fields, `model_type` among them, and others."""
    group, limits = engine.group, engine.config
    manifest = group.artifact.manifest
    model = manifest.model
    by_number = dict(enumerate(model.labels))
    return {
        "model_id": model.source,
        "model_sha": model.revision,
        "model_digest": model.digest,
        "model_type": {_kind(model): {"id2label": by_number, "label2id": {label: n for n, label in by_number.items()}}},
        "architecture": model.model_type,
        "task": model.task,
        "problem_type": model.problem_type,
        "labels": model.labels,
        "model_dtype": manifest.dtype,
        "tp_degree": manifest.tp,
        "chosen": group.executor.topology.why or None,
        "runtime": manifest.runtime,
        "layout": group.executor.topology.layout,
        "layout_failure": group.layout_failure,
        "max_input_length": engine.codec.max_length,
        "max_batch_tokens": limits.max_batch_tokens,
        "max_concurrent_requests": limits.max_concurrent_requests,
        "max_client_batch_size": limits.max_client_batch_size,
        "max_batch_requests": None,
        "auto_truncate": limits.auto_truncate,
        "tokenization_workers": TOKENIZER_THREADS,
        "payload_limit": limits.payload_limit_bytes,
        "version": __version__,
        "versions": manifest.versions,
        "parity": group.parity,
        "artifact": str(group.artifact.directory),
        "traced_now": group.traced,
        "state": group.lifecycle.state.value,
        "uptime_s": round(time.monotonic() - engine.startup[-1].ended, 1),
        "restarts": engine.restarts,
        "metrics": read_figures(engine),
        "key": _key_in_use(),
        "ranks": [
            {
                "rank": worker.rank,
                "pid": worker.pid,
                "cores": worker.cores,
                "threads": worker.threads,
                "sharded_bytes": record.sharded_bytes,
                "replicated_bytes": record.replicated_bytes,
            }
            for worker, record in zip(group.workers, manifest.ranks, strict=True)
        ],
        "startup": [{"phase": p.name, "seconds": round(p.seconds, 3), "note": p.note} for p in engine.startup],
    }


def _key_in_use() -> dict[str, Any] | None:
    """The key that this request shows, and what it was used for on this replica; None: no key is asked for."""
    caller = ASKING.get()
    return None if caller is None else {"name": caller.name} | asdict(caller.usage)


def _kind(model: ModelRecord) -> str:
    """TEI's name for what the model does: with one label it is a reranker. (TEI has no classifiers of tokens.)"""
    if model.task == TOKEN:
        return "token_classifier"
    return "reranker" if len(model.labels) == 1 else "classifier"
