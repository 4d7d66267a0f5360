"""vLLM's dialect of scores: ``POST /score``, and ``/v1/score``, its older path. (`cohere`: its reranking.)

Source: vLLM (entrypoints/pooling/scoring/{protocol,serving,io_processor}.py): one text with each of several, or each
with its own. Deliberate differences: which models have a score, and which, is said in `relevance`; only the second text
of a pair is cut; texts with images are not taken; what is not known is refused by name, and not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from tpray.errors import InputError, ItemError
from tpray.serving.dialects import tei
from tpray.serving.dialects.base import ANSWERS_UNTIL, Answering, Dialect, Handler, Rendered, Way, as_response, body_of
from tpray.serving.dialects.openai_errors import RESPONSES, check_keys, render_error
from tpray.serving.dialects.vllm import ListResponse, render
from tpray.serving.dialects.vllm_options import Options
from tpray.serving.pairs import score_pairs

PATHS = ("/score", "/v1/score")

NAMES = (("queries", "documents"), ("text_1", "text_2"), ("queries", "items"), ("data_1", "data_2"))
"""What vLLM's versions call the two texts of pairs."""

Texts = str | list[str] | None


class ScoreRequest(Options):
    """The body of ``POST /score``: ``queries`` and ``documents``, or ``text_1`` and ``text_2``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"queries": "What is Paris?", "documents": ["Paris is a capital.", "Apples are bad."]},
                {"text_1": ["What is Paris?", "What is Rome?"], "text_2": ["A capital.", "A capital too."]},
            ]
        }
    )

    queries: Texts = Field(None, description="one, or as many as there are documents")
    documents: Texts = None
    items: Texts = Field(None, description="another name of documents")
    text_1: Texts = Field(None, description="the older name of queries")
    text_2: Texts = Field(None, description="the older name of documents")
    data_1: Texts = Field(None, description="another name of text_1")
    data_2: Texts = Field(None, description="another name of text_2")
    max_tokens_per_doc: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="of each document no more tokens are read"
    )


class Scored(BaseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(ListResponse):
    """The answer to ``POST /score``."""

    data: list[Scored]


def pairs_of(asked: ScoreRequest) -> tuple[list[str], list[str], str]:
    """The first and the second texts, and what the second are called.

    Raises:
        InputError: fields of two pairs of names are there, or half of one.
    """
    given = {name for pair in NAMES for name in pair if getattr(asked, name) is not None}
    names = next((pair for pair in NAMES if given == set(pair)), None)
    if names is None:
        said = f"{' and '.join(f'`{name}`' for name in sorted(given))} do not go together" if len(given) > 1 else ""
        said = said or (f"`{min(given)}` is there alone" if given else "there is nothing to score")
        raise InputError(f"{said}: send `queries` and `documents`, or `text_1` and `text_2`, each a text or a list")
    first, second = (getattr(asked, name) for name in names)
    return _listed(first), _listed(second), names[1]


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    engine = answering.engine

    async def score(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_concurrent_requests
        asked = tei.read(ScoreRequest, body, most, '{"queries": "a question", "documents": ["an answer"]}')
        check_keys(asked)
        answering.names.check(asked.model)
        queries, documents, name = pairs_of(asked)
        worth()
        try:
            scored = await score_pairs(
                engine, queries, documents,
                scoring=asked.scoring(),
                truncate=asked.truncate_prompt_tokens is not None,
                direction=asked.direction,
                deadline=deadline,
                max_length=asked.most_tokens(engine.codec.max_length),
                document_tokens=asked.max_tokens_per_doc,
            )  # fmt: skip
        except ItemError as e:
            raise type(e)(e.said_of(f"`{name}`: item {e.item}")) from e
        data = [{"index": n, "object": "score", "score": value} for n, value in enumerate(scored.scores)]
        return Rendered(200, render("score", asked, answering, scored.tokens, data))

    own = Way(score, DIALECT.answer_error)
    return dict.fromkeys(PATHS, answering.handler(lambda _: own))


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The routes, as FastAPI documents them."""
    router = APIRouter()

    async def score(request: Request) -> Response:
        """Score pairs in their order: one query with each document, or each with its own (vLLM's dialect)."""
        return as_response(await answering[PATHS[0]](request.scope, request.receive))

    for path in PATHS:
        router.post(
            path,
            operation_id=f"score{path.replace('/', '_')}",
            response_model=ScoreResponse,
            responses=RESPONSES,
            openapi_extra={"requestBody": body_of(ScoreRequest), "parameters": [ANSWERS_UNTIL]},
        )(score)
    return router


DIALECT = Dialect("vLLM, scores", handlers, routes, render_error)
