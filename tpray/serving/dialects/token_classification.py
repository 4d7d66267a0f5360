"""``POST /token_classification``: labels for the tokens of a text. The path is tpray's own; the body is Hugging Face's.

Source: https://huggingface.co/docs/inference-providers/tasks/token-classification (inputs and parameters; the answer is
the pipeline's). Deliberate differences: a list of texts is a batch; what is too long is cut or refused, as the server
or the body says; each token's logits can be asked for; the strategy is ``none`` unless the body says otherwise, as in
transformers. At Hugging Face's own paths (`hugging_face`) it is ``simple``, as it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

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
    Respond,
    Way,
    as_response,
    body_of,
)
from tpray.serving.dialects.tei import ERRORS, NOWHERE, ErrorResponse, read, render_error, timing_headers
from tpray.serving.engine import Engine
from tpray.serving.entities import Strategy
from tpray.serving.tagging import Tagging, tag

PATH = "/token_classification"


class Parameters(Form):
    """How tokens are labelled."""

    aggregation_strategy: Strategy | None = Field(
        None, description="which tokens are one entity, and whose score it has; null: none here, simple at `/`"
    )
    ignore_labels: list[str] | None = Field(None, description="entities of these are left out; null: O")
    raw_scores: Flag = Field(None, description="each token's logits too, in the order of the labels in /info")
    truncate: Flag = Field(None, description=CUT)
    truncation_direction: End = Field(None, description=CUT_FROM)


class TokenRequest(Form):
    """The body of ``POST /token_classification``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "Sarah lives in London", "parameters": {"aggregation_strategy": "simple"}},
                {"inputs": ["Sarah lives in London", "So does Tom"]},
            ]
        }
    )

    inputs: str | list[str] = Field(description="a text, or a list of them")
    parameters: Parameters | None = None


class Entity(BaseModel):
    """A token, or several that are one entity, and where they are in the text."""

    entity: str | None = Field(None, description="the label of a token, with the strategy none")
    entity_group: str | None = Field(None, description="the label of an entity, without B- and I-")
    score: float
    index: int | None = Field(None, description="the token's place among all, special ones too, with the strategy none")
    word: str
    start: int | None
    end: int | None
    logits: list[float] | None = None


def labelling(engine: Engine, strategy: Strategy, elsewhere: Mapping[str, str] = NOWHERE) -> Respond:
    """What answers a `TokenRequest`. strategy: of a body that names none. elsewhere: see `read`."""

    async def label(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_client_batch_size
        asked = read(TokenRequest, body, most, '{"inputs": "some text"}', elsewhere=elsewhere)
        worth()
        how = asked.parameters or Parameters()
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        tagging = Tagging(
            how.aggregation_strategy or strategy,
            ("O",) if how.ignore_labels is None else how.ignore_labels,
            bool(how.raw_scores),
            engine.config.cuts(how.truncate),
            how.truncation_direction or "Right",
        )
        answer = await tag(engine, texts, tagging, deadline)
        found = answer.entities[0] if isinstance(asked.inputs, str) else answer.entities
        return Rendered(200, json.dumps(found, ensure_ascii=False).encode(), timing_headers(answer))

    return label


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    way = Way(labelling(answering.engine, "none"), DIALECT.answer_error)
    return {PATH: answering.handler(lambda _: way)}


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The route, as FastAPI documents it."""
    router = APIRouter()

    @router.post(
        PATH,
        response_model=list[Entity] | list[list[Entity]],
        responses={status: {"model": ErrorResponse} for _, status, _ in ERRORS},
        openapi_extra={
            "requestBody": body_of(TokenRequest),
            "parameters": [ANSWERS_UNTIL],
        },
    )
    async def token_classification(request: Request) -> Response:
        """Label the tokens of a text, as transformers' token-classification pipeline does."""
        return as_response(await answering[PATH](request.scope, request.receive))

    return router


DIALECT = Dialect("token classification", handlers, routes, render_error)
