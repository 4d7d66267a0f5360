"""Hugging Face's inference API: ``POST /`` and ``POST /models/{id}``, as `huggingface_hub.InferenceClient` asks.

Sources: https://huggingface.co/docs/inference-providers/tasks/text-classification and ``token-classification``
(``inputs``, ``parameters``, ``{"error"}``); huggingface_hub 2.4 (inference/_client.py takes the first element of the
answer to a text); transformers' pipeline (a pair is ``{"text", "text_pair"}``; ``truncation``). Deliberate differences:
a parameter that is not known is refused by name, as is one of another task; a list of texts is a batch; statuses are
TEI's. TEI itself takes the body of its ``/predict`` at ``/``: that is refused by its keys, or where it has none of its
own, read as this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope

from tpray.errors import EmptyInputError, UnknownModelError
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.dialects import tei
from tpray.serving.dialects.base import (
    ANSWERS_UNTIL,
    CUT,
    Answering,
    Dialect,
    Flag,
    Form,
    Handler,
    Rendered,
    Way,
    as_response,
    body_of,
    check_size,
    logged,
)
from tpray.serving.dialects.tei import ERRORS, read, timing_headers
from tpray.serving.dialects.token_classification import Entity, TokenRequest, labelling
from tpray.serving.scores import Activation, Scoring
from tpray.tokenizer import Plain

ROOT, MODEL, MODEL_OF_OWNER = "/", "/models/{model}", "/models/{owner}/{model}"
PATHS = (ROOT, MODEL, MODEL_OF_OWNER)

_OTHER_TASK = "is a parameter of %s, and this model does text classification: leave it out, or ask another model"
_PREDICT = "is an option of POST /predict, which TEI's clients ask; here it is among the `parameters`, if at all"
ELSEWHERE = {
    name: f"`{name}` {said}"
    for said, names in {
        _OTHER_TASK % "zero-shot classification": ("candidate_labels", "multi_label", "hypothesis_template"),
        _OTHER_TASK % "token classification": ("aggregation_strategy", "ignore_labels", "stride"),
        _OTHER_TASK % "text generation": ("max_new_tokens", "return_full_text", "do_sample", "temperature"),
        _OTHER_TASK % "feature extraction": ("normalize", "prompt_name"),
        _PREDICT: ("raw_scores", "truncate", "truncation_direction", "chunks"),
    }.items()
    for name in names
}
"""What is said of parameters that clients send for something else."""
_TOKENS_INSTEAD = "belongs to text classification, and this model labels the tokens of texts"
ELSEWHERE_OF_TOKENS = {
    **{name: said.replace("does text classification", "labels tokens") for name, said in ELSEWHERE.items()},
    **{name: f"`{name}` {_TOKENS_INSTEAD}" for name in ("function_to_apply", "top_k")},
    "truncation": "`truncation` is `truncate` here",
    "stride": "`stride` is not known here: a text that is too long is cut, or refused with `truncate` false",
}
"""The same where the model labels tokens."""


class Pair(Form):
    """Two texts that the model reads together; or one."""

    text: str
    text_pair: str | None = None


class Parameters(Form):
    """What is made of the logits."""

    function_to_apply: Activation | None = Field(None, description="null: the checkpoint's own")
    top_k: int | None = Field(None, ge=1, description="so many labels, the best; null: all")
    truncation: Flag = Field(None, description=CUT)


class TextRequest(Form):
    """The body of ``POST /`` where the model labels texts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "I like you", "parameters": {"top_k": 1}},
                {"inputs": [{"text": "The firm is in Paris", "text_pair": "The company is based in Paris"}]},
            ]
        }
    )

    inputs: str | Pair | list[str | Pair] = Field(description="a text, or {text, text_pair}, or a list of these")
    parameters: Parameters | None = None


class Element(BaseModel):
    """One label and its score."""

    label: str
    score: float


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: str


def _item(value: str | Pair) -> Plain:
    if isinstance(value, str):
        return value
    return value.text if value.text_pair is None else (value.text, value.text_pair)


def render_error(error: Exception, to_cut: str = "`truncation` to true") -> Rendered:
    """Status, body and headers for an error: TEI's status. to_cut: as for `tei.sentence_of`."""
    said = ErrorResponse(error=tei.sentence_of(error, to_cut=to_cut))
    return tei.render_error(error)._replace(body=said.model_dump_json().encode())


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    engine = answering.engine

    async def classify(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_client_batch_size
        asked = read(TextRequest, body, most, '{"inputs": "some text"}', elsewhere=ELSEWHERE)
        inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        if not inputs:
            raise EmptyInputError("`inputs` is empty: send at least one text")
        check_size(len(inputs), most, "inputs")
        worth()
        how = asked.parameters or Parameters()
        scoring = Scoring(how.function_to_apply, how.top_k)
        items = [_item(value) for value in inputs]
        answer = await engine.classify(items, scoring, engine.config.cuts(how.truncation), deadline=deadline)
        return Rendered(200, json.dumps(answer.rendered(), ensure_ascii=False).encode(), timing_headers(answer))

    way = Way(classify, DIALECT.answer_error)
    if engine.codec.record.task == TOKEN:
        label = labelling(engine, "simple", ELSEWHERE_OF_TOKENS)
        way = Way(label, lambda error: logged(render_error(error, tei.TO_CUT), error))
    answer = answering.handler(lambda _: way)

    async def named(scope: Scope, receive: Receive) -> Rendered:
        try:
            parts: Mapping[str, str] = scope["path_params"]
            answering.names.check("/".join(parts[part] for part in ("owner", "model") if part in parts))
        except UnknownModelError as e:
            return DIALECT.answer_error(e)
        return await answer(scope, receive)

    return {ROOT: answer, MODEL: named, MODEL_OF_OWNER: named}


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """The routes, as FastAPI documents them."""
    router = APIRouter()
    options: dict[str, Any] = {
        "response_model": list[list[Element]] | list[Entity] | list[list[Entity]],
        "responses": {status: {"model": ErrorResponse} for _, status, _ in ERRORS},
        "openapi_extra": {"requestBody": body_of(TextRequest, TokenRequest), "parameters": [ANSWERS_UNTIL]},
    }

    @router.post(ROOT, **options)
    async def infer(request: Request) -> Response:
        """Label a text, or the tokens of one where the model does that (Hugging Face's inference API)."""
        return as_response(await answering[ROOT](request.scope, request.receive))

    @router.post(MODEL, **options)
    async def infer_model(model: str, request: Request) -> Response:
        """The same, of a model by its name: any, unless the server has names for its own."""
        return as_response(await answering[MODEL](request.scope, request.receive))

    @router.post(MODEL_OF_OWNER, **options)
    async def infer_model_of_owner(owner: str, model: str, request: Request) -> Response:
        """The same, of a model by its id on the Hub."""
        return as_response(await answering[MODEL_OF_OWNER](request.scope, request.receive))

    return router


DIALECT = Dialect("Hugging Face's inference API", handlers, routes, render_error)
