"""The rerank dialect of Cohere, which Jina, vLLM and Infinity speak too: ``POST /v1/rerank`` and ``/v2/rerank``.

Sources: https://docs.cohere.com/reference/rerank (query, documents, top_n; results with index and relevance_score;
errors with message), https://jina.ai/reranker (usage), vLLM's entrypoints (the same body on /v1 and /v2). Deliberate
differences: what is not known is refused by name, and not ignored; documents are cut, and not read in chunks, unless
that is asked for; errors have TEI's statuses. ``POST /rerank``, which TEI has too, takes this body as well; see
`tei_rerank`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from tpray.errors import InputError
from tpray.serving.answers import Ranking
from tpray.serving.chunks import Chunks
from tpray.serving.dialects import tei
from tpray.serving.dialects.base import ANSWERS_UNTIL, Answering, Dialect, Handler, Rendered, Way, as_response, body_of
from tpray.serving.dialects.openai_errors import check_keys
from tpray.serving.dialects.vllm_options import Options
from tpray.serving.scores import Scoring

PATHS = ("/v1/rerank", "/v2/rerank")

Count = Annotated[StrictInt, Field(ge=1)]


class Document(BaseModel):
    """A document as an object. A key that it has not is refused by name: nothing but its text is read."""

    model_config = ConfigDict(extra="forbid")

    text: str


class RerankRequest(Options):
    """The body of ``POST /v1/rerank`` and ``/v2/rerank``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "What is Paris?", "documents": ["Paris is a capital.", "Apples are bad."], "top_n": 1}
            ]
        },
    )

    query: str
    documents: list[str | Document] = Field(description="texts, or objects with a text")
    top_n: Count | None = Field(None, description="how many of the best; null: all")
    return_documents: StrictBool | None = Field(None, description="repeat each document; null: no")
    chunks: Chunks | StrictBool | None = Field(None, description=tei.CHUNKS)
    max_chunks_per_doc: Annotated[StrictInt, Field(ge=1, le=256)] | None = Field(
        None, description="read documents in so many chunks at most: the same as {max_chunks}; null: no"
    )
    max_tokens_per_doc: Count | None = Field(
        None, description="of each document no more tokens are read; null: as many as there is room for"
    )
    truncation: StrictBool | None = Field(
        None, description="Jina's: whether long documents are cut; null: that is done"
    )
    raw_scores: StrictBool | None = Field(None, description="Infinity's: logits, as use_activation false gives them")


class Result(BaseModel):
    """One document: its number, and how relevant it is."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """What a successful answer looks like."""

    id: str
    model: str
    results: list[Result]
    meta: dict[str, Any]
    usage: dict[str, int]


class ErrorResponse(BaseModel):
    """What every error looks like."""

    message: str


def _chunks(asked: RerankRequest) -> Chunks | None:
    most = asked.max_chunks_per_doc
    if most is None:
        return Chunks.of(asked.chunks)
    if asked.chunks is not None:
        raise InputError("`max_chunks_per_doc` and `chunks` say the same: give one of them")
    return Chunks(max_chunks=most)


def _scoring(asked: RerankRequest) -> Scoring:
    scoring = asked.scoring()
    if asked.raw_scores and asked.use_activation:
        raise InputError("`raw_scores` asks for logits, and `use_activation` for none: give one of them")
    return Scoring("none" if asked.raw_scores else scoring.activation, asked.top_n)


def _truncate(asked: RerankRequest) -> bool:
    if asked.truncation is False and asked.truncate_prompt_tokens is not None:
        raise InputError("`truncation` is false, and `truncate_prompt_tokens` says how to cut: give one of them")
    return asked.truncation is not False


def render(ranking: Ranking, texts: list[str], documents: bool, model: str) -> bytes:
    """The body of a successful answer."""
    results = [
        {"index": each.index, "relevance_score": each.score}
        | ({"document": {"text": texts[each.index]}} if documents else {})
        for each in ranking.documents
    ]
    answer = {
        "id": str(uuid.uuid4()),
        "model": model,
        "results": results,
        "meta": {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": ranking.tokens}},
        "usage": {"prompt_tokens": ranking.tokens, "total_tokens": ranking.tokens},
    }
    return json.dumps(answer, ensure_ascii=False).encode()


def render_error(error: Exception) -> Rendered:
    """Status, body and headers for an error: TEI's status."""
    said = ErrorResponse(message=tei.sentence_of(error, "documents", "`truncation` to true"))
    return tei.render_error(error)._replace(body=said.model_dump_json().encode())


async def rank(
    answering: Answering, body: bytearray, deadline: float, worth: Callable[[], None]
) -> tuple[RerankRequest, list[str], Ranking]:
    """The request in ``body``, its documents, and their ranking."""
    engine, most = answering.engine, answering.engine.config.max_concurrent_requests
    asked = tei.read(RerankRequest, body, most, '{"query": "a question", "documents": ["an answer"]}')
    check_keys(asked)
    answering.names.check(asked.model)
    texts = [each if isinstance(each, str) else each.text for each in asked.documents]
    scoring, cut, chunks = _scoring(asked), _truncate(asked), _chunks(asked)
    length = asked.most_tokens(engine.codec.max_length)
    worth()
    ranking = await engine.rerank(
        asked.query, texts, scoring, cut, asked.direction, deadline, chunks, length, asked.max_tokens_per_doc
    )
    return asked, texts, ranking


def way(answering: Answering) -> Way:
    """How these requests are answered, and their errors."""

    async def rerank(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        asked, texts, ranking = await rank(answering, body, deadline, worth)
        answer = render(ranking, texts, bool(asked.return_documents), answering.names.listed[0])
        return Rendered(200, answer, tei.timing_headers(ranking))

    return Way(rerank, DIALECT.answer_error)


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    own = way(answering)
    return dict.fromkeys(PATHS, answering.handler(lambda _: own))


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The routes, as FastAPI documents them."""
    router = APIRouter()

    async def rerank(request: Request) -> Response:
        """Score how relevant each document is for a query, the best first (Cohere's, Jina's and vLLM's dialect)."""
        return as_response(await answering[PATHS[0]](request.scope, request.receive))

    for path in PATHS:
        router.post(
            path,
            operation_id=f"rerank{path.replace('/', '_')}",
            response_model=RerankResponse,
            responses={status: {"model": ErrorResponse} for _, status, _ in tei.ERRORS},
            openapi_extra={
                "requestBody": body_of(RerankRequest),
                "parameters": [ANSWERS_UNTIL],
            },
        )(rerank)
    return router


DIALECT = Dialect("Cohere's rerank", handlers, routes, render_error)
