"""The TEI dialect: ``POST /rerank``.

Source: https://huggingface.github.io/text-embeddings-inference (RerankRequest, Rank). Deliberate differences: more
texts than ``max_client_batch_size`` are taken; ``top_n`` and ``chunks`` are options; a key that is not known is refused
by name; only texts are cut, and never the query; a model with two labels is a reranker too; scores follow the
checkpoint's activation. Cohere's clients and others send theirs to ``/rerank`` as well: a body with ``documents`` and
without ``texts`` is answered as `cohere` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tpray.serving.answers import Ranking
from tpray.serving.chunks import Chunks
from tpray.serving.dialects import cohere
from tpray.serving.dialects.base import (
    ANSWERS_UNTIL,
    CUT,
    CUT_FROM,
    Answering,
    Dialect,
    End,
    Flag,
    Form,
    Handler,
    Rendered,
    Way,
    as_response,
    body_of,
)
from tpray.serving.dialects.tei import CHUNKS, ERRORS, ErrorResponse, read, render_error, timing_headers
from tpray.serving.scores import Scoring

RERANK = "/rerank"

_DOCUMENTS, _TEXTS = (re.compile(rb'"%s"\s*:' % name) for name in (b"documents", b"texts"))
"""Keys, for inside a string a quotation mark is escaped: no body is read to tell whose it is."""


class RerankRequest(Form):
    """The body of ``POST /rerank``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "What is Paris?", "texts": ["Paris is the capital of France.", "Apples are bad for you."]}
            ]
        }
    )

    query: str
    texts: list[str] = Field(description="as many as may wait for a step: max_concurrent_requests in /info")
    raw_scores: Flag = Field(None, description="logits instead of what the checkpoint's activation makes of them")
    return_text: Flag = Field(None, description="repeat each text")
    truncate: Flag = Field(None, description=CUT)
    truncation_direction: End = Field(None, description=CUT_FROM)
    top_n: int | None = Field(None, ge=1, description="how many of the best, which LiteLLM asks for; null: all")
    chunks: Chunks | Flag = Field(None, description=CHUNKS)


class Rank(BaseModel):
    """One text: its number, and how relevant it is."""

    index: int
    score: float
    text: str | None = None


def render(ranking: Ranking, request: RerankRequest) -> bytes:
    """The body of a successful answer."""
    found = [
        {"index": each.index, "score": each.score}
        | ({"text": request.texts[each.index]} if request.return_text else {})
        for each in ranking.documents
    ]
    return json.dumps(found, ensure_ascii=False).encode()


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers TEI's requests."""
    engine = answering.engine

    async def rerank(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_concurrent_requests
        asked = read(RerankRequest, body, most, '{"query": "a question", "texts": ["an answer"]}')
        worth()
        ranking = await engine.rerank(
            asked.query,
            asked.texts,
            Scoring("none" if asked.raw_scores else None, asked.top_n),
            engine.config.cuts(asked.truncate),
            asked.truncation_direction or "Right",
            deadline=deadline,
            chunks=Chunks.of(asked.chunks),
        )
        return Rendered(200, render(ranking, asked), timing_headers(ranking))

    own, other = Way(rerank, DIALECT.answer_error), cohere.way(answering)
    return {RERANK: answering.handler(lambda body: other if _is_cohere(body) else own)}


def _is_cohere(body: bytearray) -> bool:
    return _DOCUMENTS.search(body) is not None and _TEXTS.search(body) is None


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """TEI's route, as FastAPI documents it."""
    router = APIRouter()

    @router.post(
        RERANK,
        response_model=list[Rank] | cohere.RerankResponse,
        responses={status: {"model": ErrorResponse | cohere.ErrorResponse} for _, status, _ in ERRORS},
        openapi_extra={
            "requestBody": body_of(RerankRequest, cohere.RerankRequest),
            "parameters": [ANSWERS_UNTIL],
        },
    )
    async def rerank(request: Request) -> Response:
        """Score how relevant each text is for a query, the best first (TEI's dialect; with ``documents`` Cohere's)."""
        return as_response(await answering[RERANK](request.scope, request.receive))

    return router


DIALECT = Dialect("text-embeddings-inference, rerank", handlers, routes, lambda error: render_error(error, "texts"))
