"""Infinity's dialect: ``POST /infinity/classify`` and ``/infinity/rerank``, ``GET /models``.

Source: infinity_emb (fastapi_schemas/pymodels.py, infinity_server.py, transformer/classifier/torch.py). Its server has
a prefix for its paths, and here ``/infinity`` may be it: without, ``/classify`` is vLLM's as well, and ``/rerank``
Cohere's and vLLM's, whose answers have documents as objects and not as texts. A body for ``/classify`` is Infinity's if
it has ``raw_scores``, which Infinity's own client always sends and vLLM does not know; see `vllm`. As there, long texts
are cut. Deliberate differences: ``raw_scores`` acts; a model that is not served is 404, and not 400; a list has as many
items as ``max_client_batch_size`` says.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from tpray.serving.answers import Timing
from tpray.serving.dialects import cohere, tei
from tpray.serving.dialects.base import (
    ANSWERS_UNTIL,
    Answering,
    Dialect,
    Handler,
    Rendered,
    Way,
    as_response,
    body_of,
    check_size,
    logged,
)
from tpray.serving.dialects.openai_errors import RESPONSES, check_keys, render_error
from tpray.serving.model_names import ModelNames
from tpray.serving.scores import OWN, RAW

CLASSIFY, RERANK = "/infinity/classify", "/infinity/rerank"
MODELS = ("/models", "/infinity/models")

_RAW_SCORES = re.compile(rb'"raw_scores"\s*:')
"""A key, for inside a string a quotation mark is escaped."""


class ClassifyRequest(BaseModel):
    """The body of ``POST /classify`` that Infinity's clients send."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"input": ["Paris is a capital."], "raw_scores": False}]}
    )

    input: list[str] = Field(description="texts; long ones are cut at their end")
    model: str | None = Field(None, description="one that is served; null: the one that there is")
    raw_scores: StrictBool | None = Field(None, description="logits instead of probabilities")


class ClassifyResponse(BaseModel):
    """Its answer: of each text every label, the best first."""

    object: Literal["classify"]
    data: list[list[tei.Prediction]]
    model: str
    usage: dict[str, int]
    id: str
    created: int


class Result(BaseModel):
    """One document: how relevant it is, and its number."""

    relevance_score: float
    index: int
    document: str | None = None


class RerankResponse(BaseModel):
    """The answer to ``POST /infinity/rerank``."""

    object: Literal["rerank"]
    results: list[Result]
    model: str
    usage: dict[str, int]
    id: str
    created: int


class Model(BaseModel):
    """A name of the model. stats: tokens that wait for a step, and the most texts in a request."""

    id: str
    stats: dict[str, int]
    object: Literal["model"] = "model"
    owned_by: str = "tpray"
    created: int
    backend: str
    capabilities: list[str]


class ModelsResponse(BaseModel):
    """The answer to ``GET /models``."""

    data: list[Model]
    object: Literal["list"] = "list"


def is_infinity(body: bytearray) -> bool:
    """Whether a body for ``/classify`` is Infinity's, and not vLLM's."""
    return _RAW_SCORES.search(body) is not None


def way(answering: Answering) -> Way:
    """How these requests are answered, and their errors."""
    engine, names = answering.engine, answering.names

    async def classify(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_client_batch_size
        asked = tei.read(ClassifyRequest, body, most, '{"input": ["some text"], "raw_scores": false}')
        check_keys(asked)
        names.check(asked.model)
        check_size(len(asked.input), most, "input")
        worth()
        answer = await engine.classify(asked.input, RAW if asked.raw_scores else OWN, True, "Right", deadline)
        found = _answer("classify", "data", answer.rendered(), names, answer)
        return Rendered(200, found, tei.timing_headers(answer))

    return Way(classify, DIALECT.answer_error)


def _rerank_way(answering: Answering) -> Way:
    async def rerank(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        asked, texts, ranking = await cohere.rank(answering, body, deadline, worth)
        results = [
            {"relevance_score": each.score, "index": each.index}
            | ({"document": texts[each.index]} if asked.return_documents else {})
            for each in ranking.documents
        ]
        found = _answer("rerank", "results", results, answering.names, ranking)
        return Rendered(200, found, tei.timing_headers(ranking))

    return Way(rerank, lambda error: logged(render_error(error, "documents"), error))


def _answer(kind: str, field: str, found: Any, names: ModelNames, timing: Timing) -> bytes:
    answer = {
        "object": kind,
        field: found,
        "model": names.listed[0],
        "usage": {"prompt_tokens": timing.tokens, "total_tokens": timing.tokens},
        "id": f"infinity-{uuid.uuid4()}",
        "created": int(time.time()),
    }
    return json.dumps(answer, ensure_ascii=False).encode()


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    classify, rerank = way(answering), _rerank_way(answering)
    return {CLASSIFY: answering.handler(lambda _: classify), RERANK: answering.handler(lambda _: rerank)}


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The routes, as FastAPI documents them."""
    router = APIRouter()

    @router.post(
        CLASSIFY,
        operation_id="infinity_classify",
        response_model=ClassifyResponse,
        responses=RESPONSES,
        openapi_extra={"requestBody": body_of(ClassifyRequest), "parameters": [ANSWERS_UNTIL]},
    )
    async def classify(request: Request) -> Response:
        """Score every label for texts, the best first (Infinity's dialect)."""
        return as_response(await answering[CLASSIFY](request.scope, request.receive))

    @router.post(
        RERANK,
        operation_id="infinity_rerank",
        response_model=RerankResponse,
        responses=RESPONSES,
        openapi_extra={"requestBody": body_of(cohere.RerankRequest), "parameters": [ANSWERS_UNTIL]},
    )
    async def rerank(request: Request) -> Response:
        """Score how relevant each document is for a query, the best first (Infinity's dialect)."""
        return as_response(await answering[RERANK](request.scope, request.receive))

    return router


def pages(answering: Answering) -> APIRouter:
    """``GET /models``, and with the prefix."""
    router, created, engine = APIRouter(), int(time.time()), answering.engine
    backend = engine.group.artifact.manifest.runtime
    can = [name for kind, name in (("text", "classify"), ("query", "rerank")) if kind in answering.accepts]

    async def models() -> ModelsResponse:
        """What requests may call the model, and its load (Infinity's dialect)."""
        stats = {"queued_tokens": engine.queued_tokens, "batch_size": engine.config.max_client_batch_size}
        names = answering.names.listed
        return ModelsResponse(
            data=[Model(id=name, stats=stats, created=created, backend=backend, capabilities=can) for name in names]
        )

    for path in MODELS:
        router.get(path, operation_id=path[1:].replace("/", "_"))(models)
    return router


DIALECT = Dialect("Infinity", handlers, routes, render_error, pages)
