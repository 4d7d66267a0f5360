"""``POST /token_classification``: labels for the tokens of a text. The path is tpray's own; the body is Hugging Face's.

Source: https://huggingface.co/docs/inference-providers/tasks/token-classification (inputs and parameters; the answer is
the pipeline's). Deliberate differences: a list of texts is a batch; what is too long is refused unless ``truncate`` is
set; each token's logits can be asked for; the strategy is ``none`` unless the body says otherwise, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tpray.errors import InputError
from tpray.serving.codec import Direction
from tpray.serving.dialects.base import ANSWERS_UNTIL, Answering, Dialect, Handler, Rendered, Way, as_response, body_of
from tpray.serving.dialects.tei import ERRORS, ErrorResponse, read, render_error, timing_headers
from tpray.serving.entities import Strategy
from tpray.serving.tagging import Tagging, tag

PATH = "/token_classification"


class Parameters(BaseModel):
    """How tokens are labelled."""

    model_config = ConfigDict(extra="allow")

    aggregation_strategy: Strategy = Field("none", description="which tokens are one entity, and whose score it has")
    ignore_labels: list[str] = Field(["O"], description="entities of these are left out")
    raw_scores: bool = Field(False, description="each token's logits too, in the order of the labels in /info")
    truncate: bool = Field(False, description="cut texts that are longer than the model takes")
    truncation_direction: Direction = Field("Right", description="which end is cut")


class TokenRequest(BaseModel):
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
    parameters: Parameters = Parameters()


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


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    engine = answering.engine

    async def label(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        asked = read(TokenRequest, body, engine.config.max_client_batch_size, '{"inputs": "some text"}')
        how = asked.parameters
        if how.model_extra:
            known = ", ".join(Parameters.model_fields)
            raise InputError(f"`parameters`: {next(iter(how.model_extra))!r} is not known here; there are {known}")
        worth()
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        tagging = Tagging(
            how.aggregation_strategy, how.ignore_labels, how.raw_scores, how.truncate, how.truncation_direction
        )
        answer = await tag(engine, texts, tagging, deadline)
        found = answer.entities[0] if isinstance(asked.inputs, str) else answer.entities
        return Rendered(200, json.dumps(found, ensure_ascii=False).encode(), timing_headers(answer))

    way = Way(label, DIALECT.answer_error)
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
