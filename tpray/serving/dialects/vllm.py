"""vLLM's dialect of classification: ``POST /classify`` and ``/pooling``, ``GET /v1/models``. (`vllm_score`: scores.)

Source: vLLM (entrypoints/pooling/{base,classify,pooling}/protocol.py and serving.py, renderers/params.py,
openai/models/serving.py). Where ``truncate_prompt_tokens`` cuts a text, its first tokens stay: for models that
classify, vLLM sets the tokenizer's truncation_side to right. Deliberate differences: special tokens stay where a text
is cut (``truncation_side`` cuts them off in vLLM); scores follow the checkpoint's ``problem_type``; what is not known
is refused by name, and not ignored. Infinity's clients send theirs to ``/classify`` too: a body with ``raw_scores``,
which they always send and vLLM does not know, is answered as `infinity` does.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from tpray import chat
from tpray.errors import InputError, ItemError
from tpray.serving.answers import Answer
from tpray.serving.dialects import infinity, tei
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
)
from tpray.serving.dialects.openai_errors import RESPONSES, check_keys, render_error
from tpray.serving.dialects.vllm_options import Options
from tpray.serving.scores import Score
from tpray.tokenizer import Item, Tokens

CLASSIFY, POOLING, MODELS = "/classify", "/pooling", "/v1/models"

SEND = "send a text, a list of texts, token ids (a list of whole numbers, or a list of such lists), or `messages`"


class ClassifyRequest(Options):
    """The body of ``POST /classify``: ``input`` or ``messages``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": ["Paris is a capital.", "Apples are bad."], "truncate_prompt_tokens": -1},
                {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
            ]
        }
    )

    input: str | list[str] | list[StrictInt] | list[list[StrictInt]] | None = Field(
        None, description="a text, texts, or token ids of one or several, special ones included"
    )
    messages: list[dict[str, Any]] | None = Field(None, description="one conversation: {role, content}, ...")
    add_special_tokens: StrictBool | None = Field(
        None, description="to texts; null: that is done. A chat template writes those of messages itself"
    )
    add_generation_prompt: StrictBool | None = Field(None, description="have the chat template begin the next message")
    continue_final_message: Literal[False] | None = Field(None, description="only false")


class PoolingRequest(ClassifyRequest):
    """The body of ``POST /pooling``, of a classifier."""

    task: Literal["classify"] | None = Field(None, description="what the model does")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of float32, little endian")


class Classified(BaseModel):
    """One item. probs: of every label in the order of the labels in /info; label: the likeliest."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Pooled(BaseModel):
    """One item. data: the same numbers as a classification's probs."""

    index: int
    object: Literal["pooling"]
    data: list[float] | str


class Usage(BaseModel):
    """How many tokens were computed."""

    prompt_tokens: int
    total_tokens: int


class ListResponse(BaseModel):
    """What a successful answer looks like."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class ClassifyResponse(ListResponse):
    """The answer to ``POST /classify``."""

    data: list[Classified]


class PoolingResponse(ListResponse):
    """The answer to ``POST /pooling``."""

    data: list[Pooled]


class Model(BaseModel):
    """What a request may call the model, and how many tokens it takes."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelsResponse(BaseModel):
    """The answer to ``GET /v1/models``."""

    object: Literal["list"]
    data: list[Model]


def items_of(asked: ClassifyRequest) -> list[Item]:
    """The items of a request.

    Raises:
        InputError: there is neither ``input`` nor ``messages``, or there are both; or what goes with the other.
    """
    given, messages = asked.input, asked.messages
    if (given is None) == (messages is None):
        wrong = "is missing" if given is None else "and `messages` exclude each other"
        raise InputError(f"`input` {wrong}: {SEND}")
    if messages is not None:
        if asked.add_special_tokens:
            raise InputError("`add_special_tokens`: the chat template writes those of `messages` itself: leave it out")
        try:
            return [chat.Chat(chat.Chat.of(messages).messages, bool(asked.add_generation_prompt))]
        except InputError as e:
            raise type(e)(f"`messages` {e.message}") from e
    if asked.add_generation_prompt:
        raise InputError("`add_generation_prompt` goes with `messages`: leave it out")
    if isinstance(given, str):
        return [_text(given, asked)]
    assert given is not None, "tested above"
    if given and isinstance(given[0], int):
        return [Tokens(tuple(given))]
    return [_text(each, asked) if isinstance(each, str) else Tokens(tuple(each)) for each in given]  # type: ignore[arg-type]


def _text(text: str, asked: ClassifyRequest) -> str:
    return chat.Rendered(text) if asked.add_special_tokens is False else text


def read(form: type[ClassifyRequest], body: bytearray, answering: Answering) -> Any:
    """The request in ``body``, of a model that is served; see `tei.read`."""
    limits, codec = answering.engine.config, answering.engine.codec
    try:
        asked = tei.read(form, body, limits.max_client_batch_size, '{"input": "some text"}', 8 + codec.max_length)
    except InputError as e:
        cause = e.__cause__
        if isinstance(cause, ValidationError) and cause.errors()[0]["loc"][:1] == ("input",):
            raise InputError(f"`input` has the wrong type: {SEND}") from cause
        raise
    check_keys(asked)
    answering.names.check(asked.model)
    return asked


async def classify(answering: Answering, asked: ClassifyRequest, deadline: float, worth: Callable[[], None]) -> Answer:
    """Every label's score of each item."""
    engine, items, most = answering.engine, items_of(asked), answering.engine.config.max_client_batch_size
    check_size(len(items), most, "input")
    max_length, cut = asked.most_tokens(engine.codec.max_length), asked.truncate_prompt_tokens is not None
    worth()
    try:
        return await engine.classify(
            items, asked.scoring(), cut, asked.direction, deadline, max_length=max_length if cut else None
        )
    except ItemError as e:
        if asked.messages is None or e.item is None:
            raise
        raise type(e)(f"`messages` {e.message}") from e


def by_label(scores: Sequence[Score]) -> list[float]:
    """The scores in the order of the labels."""
    return [each.score for each in sorted(scores, key=lambda each: each.index)]


def render(kind: str, asked: Options, answering: Answering, tokens: int, data: list[dict[str, Any]]) -> bytes:
    """The body of a successful answer. kind: with which its id begins."""
    answer = {
        "id": f"{kind}-{asked.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": answering.names.listed[0],
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return json.dumps(answer, ensure_ascii=False).encode()


def _classified(index: int, scores: Sequence[Score]) -> dict[str, Any]:
    return {"index": index, "label": scores[0].label, "probs": by_label(scores), "num_classes": len(scores)}


def _pooled(index: int, scores: Sequence[Score], as_text: bool) -> dict[str, Any]:
    values: Any = by_label(scores)
    if as_text:
        values = base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
    return {"index": index, "object": "pooling", "data": values}


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""

    async def of_classes(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        asked = read(ClassifyRequest, body, answering)
        answer = await classify(answering, asked, deadline, worth)
        data = [_classified(*each) for each in enumerate(answer.scores)]
        return Rendered(200, render("classify", asked, answering, answer.tokens, data), tei.timing_headers(answer))

    async def pool(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        asked = read(PoolingRequest, body, answering)
        answer = await classify(answering, asked, deadline, worth)
        data = [_pooled(*each, asked.encoding_format == "base64") for each in enumerate(answer.scores)]
        return Rendered(200, render("pooling", asked, answering, answer.tokens, data), tei.timing_headers(answer))

    own, other, pooling = (
        Way(of_classes, DIALECT.answer_error),
        infinity.way(answering),
        Way(pool, DIALECT.answer_error),
    )
    return {
        CLASSIFY: answering.handler(lambda body: other if infinity.is_infinity(body) else own),
        POOLING: answering.handler(lambda _: pooling),
    }


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The routes, as FastAPI documents them."""
    router = APIRouter()

    @router.post(
        CLASSIFY,
        response_model=ClassifyResponse | infinity.ClassifyResponse,
        responses=RESPONSES,
        openapi_extra={
            "requestBody": body_of(ClassifyRequest, infinity.ClassifyRequest),
            "parameters": [ANSWERS_UNTIL],
        },
    )
    async def classify(request: Request) -> Response:
        """Score every label for texts, token ids or a conversation (vLLM's dialect; with ``raw_scores`` Infinity's)."""
        return as_response(await answering[CLASSIFY](request.scope, request.receive))

    @router.post(
        POOLING,
        response_model=PoolingResponse,
        responses=RESPONSES,
        openapi_extra={"requestBody": body_of(PoolingRequest), "parameters": [ANSWERS_UNTIL]},
    )
    async def pooling(request: Request) -> Response:
        """Score every label, without their names (vLLM's dialect)."""
        return as_response(await answering[POOLING](request.scope, request.receive))

    return router


def pages(answering: Answering) -> APIRouter:
    """``GET /v1/models``."""
    router, created = APIRouter(), int(time.time())

    @router.get(MODELS)
    async def models() -> ModelsResponse:
        """What requests may call the model (OpenAI's and vLLM's dialect)."""
        names, longest = answering.names, answering.engine.codec.max_length
        cards = [
            Model(
                id=name, object="model", created=created, owned_by="tpray", root=names.source, parent=None,
                max_model_len=longest,
            )
            for name in names.listed
        ]  # fmt: skip
        return ModelsResponse(object="list", data=cards)

    return router


DIALECT = Dialect("vLLM", handlers, routes, render_error, pages)
