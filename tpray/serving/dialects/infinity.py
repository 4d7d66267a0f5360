"""Infinity's dialect: ``POST /classify``, which `vllm` has too, and ``GET /models``. (`cohere`: its reranking.)

Source: infinity_emb (fastapi_schemas/pymodels.py, infinity_server.py, transformer/classifier/torch.py). A body is
Infinity's if it has ``raw_scores``: Infinity's own client always sends it, and vLLM does not know it. One without gets
vLLM's answer. As there, long texts are cut. Deliberate differences: ``raw_scores`` acts; a model that is not served is
404, and not 400; a list has as many items as ``max_client_batch_size`` says.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from tpray.errors import PayloadTooLargeError
from tpray.parallel_layers.tasks import TEXT
from tpray.serving.dialects import tei
from tpray.serving.dialects.base import Answering, Dialect, Handler, Rendered, Way
from tpray.serving.dialects.openai_errors import check_keys, render_error
from tpray.serving.scores import OWN, RAW

MODELS = "/models"

_RAW_SCORES = re.compile(rb'"raw_scores"\s*:')
"""A key, for inside a string a quotation mark is escaped."""

ANY_MODEL = "default/not-specified"
"""What Infinity's client sends where its user names no model."""


class ClassifyRequest(BaseModel):
    """The body of ``POST /classify`` that Infinity's clients send."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"input": ["Paris is a capital."], "raw_scores": False}]}
    )

    input: list[str] = Field(description="texts; long ones are cut at their end")
    model: str | None = Field(None, description="one that is served; null: the one that there is")
    raw_scores: StrictBool | None = Field(description="logits instead of probabilities")


class ClassifyResponse(BaseModel):
    """Its answer: of each text every label, the best first."""

    object: Literal["classify"]
    data: list[list[tei.Prediction]]
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
        names.check(None if asked.model == ANY_MODEL else asked.model)
        if len(asked.input) > most:
            raise PayloadTooLargeError(
                f"`input` has {len(asked.input)} items and the limit is {most}: send smaller batches"
            )
        worth()
        answer = await engine.classify(asked.input, RAW if asked.raw_scores else OWN, True, "Right", deadline)
        found: dict[str, Any] = {
            "object": "classify",
            "data": answer.rendered(),
            "model": names.listed[0],
            "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens},
            "id": f"infinity-{uuid.uuid4()}",
            "created": int(time.time()),
        }
        return Rendered(200, json.dumps(found, ensure_ascii=False).encode(), tei.timing_headers(answer))

    return Way(classify, DIALECT.answer_error)


def handlers(answering: Answering) -> dict[str, Handler]:
    """None: `vllm` has the path, and asks `is_infinity`."""
    return {}


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """None of its own."""
    return APIRouter()


def pages(answering: Answering) -> APIRouter:
    """``GET /models``."""
    router, created, engine = APIRouter(), int(time.time()), answering.engine
    record, backend = engine.codec.record, engine.group.artifact.manifest.runtime

    @router.get(MODELS)
    async def models() -> ModelsResponse:
        """What requests may call the model, and its load (Infinity's dialect)."""
        stats = {"queued_tokens": engine.queued_tokens, "batch_size": engine.config.max_client_batch_size}
        reranks = record.task == TEXT and len(record.labels) in (1, 2)
        can = [*(["classify"] if record.task == TEXT else []), *(["rerank"] if reranks else [])]
        names = answering.names.listed
        return ModelsResponse(
            data=[Model(id=name, stats=stats, created=created, backend=backend, capabilities=can) for name in names]
        )

    return router


DIALECT = Dialect("Infinity", handlers, routes, render_error, pages)
