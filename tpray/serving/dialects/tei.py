"""The TEI dialect: what text-embeddings-inference's ``POST /predict`` takes, gives and complains with.

Source: https://huggingface.github.io/text-embeddings-inference (Predict, ErrorResponse). Deliberate differences:
scores follow the model's ``problem_type`` (TEI softmaxes multi-label models too), the softmax cannot overflow,
an item may be a conversation, long texts are read in ``chunks`` if that is asked for, and 429 and 503 carry
``Retry-After``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_args

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from tpray.chat import Chat
from tpray.errors import (
    DeadlineError,
    EmptyInputError,
    GroupError,
    InputError,
    ItemError,
    LogitsError,
    MisdirectedError,
    OverloadedError,
    PayloadTooLargeError,
    RefusedError,
    StepError,
    StoppingError,
    TprayError,
    UnauthorizedError,
    UnknownModelError,
    UnsupportedTaskError,
)
from tpray.serving.answers import Answer, Timing
from tpray.serving.chunks import Chunks
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
    check_size,
    has_more_values,
)
from tpray.serving.scores import OWN, RAW, Score
from tpray.tokenizer import Item, as_item

ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (EmptyInputError, 400, "Empty"),
    (PayloadTooLargeError, 413, "Validation"),
    (UnknownModelError, 404, "Validation"),
    (UnsupportedTaskError, 424, "Backend"),
    (InputError, 422, "Validation"),
    (LogitsError, 424, "Backend"),
    (MisdirectedError, 421, "Validation"),
    (UnauthorizedError, 401, "Unauthorized"),
    (StepError, 424, "Backend"),
    (RefusedError, 424, "Backend"),
    (OverloadedError, 429, "Overloaded"),
    (StoppingError, 503, "Unhealthy"),
    (GroupError, 503, "Unhealthy"),
    (DeadlineError, 504, "Backend"),
    (Exception, 424, "Backend"),
)
"""The one table from errors to statuses and TEI's error types; the first that matches."""

PREDICT = "/predict"

RESTART_S = 5
"""When to try again where a group restarts: about the time that one needs."""

OTHER_VALUES = 1000
"""How many values a body may have besides its items."""

MESSAGES, MESSAGE_VALUES = 256, 24
"""How many messages an item may have on the average of a full batch, and how many values each of them."""

CHUNKS = "read texts that are too long in overlapping chunks, and aggregate their scores; of a pair the second text"

Message = dict[str, Any]


class PredictRequest(Form):
    """The body of ``POST /predict``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        "The company HuggingFace is based in New York City",
                        "HuggingFace's headquarters are situated in Manhattan",
                    ]
                },
                {"inputs": [["Apples are bad"], ["one text", "and its pair"]], "raw_scores": True},
                {"inputs": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
            ]
        }
    )

    inputs: Annotated[
        # What comes most first: pydantic takes the first that matches, without a look at the others.
        str | list[list[str]] | list[str] | Message | list[Message] | list[list[str] | list[Message] | Message],
        Field(
            union_mode="left_to_right",
            description="a text; a list of two: one pair; a list of messages ({role, content}), or {messages: [...]}: "
            "one conversation; a list of lists: a batch of texts ([a]), pairs ([a, b]) and conversations",
        ),
    ]
    raw_scores: Flag = Field(None, description="logits instead of probabilities")
    truncate: Flag = Field(None, description=CUT)
    truncation_direction: End = Field(None, description=CUT_FROM)
    chunks: Chunks | Flag = Field(None, description=CHUNKS)


class Prediction(BaseModel):
    """One label and its score."""

    score: float
    label: str


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: str
    error_type: str


R = TypeVar("R", bound=BaseModel)

LONGEST_NAME = 64
"""Of a key that is not known, so many characters are repeated."""

NOWHERE: Mapping[str, str] = {}


def parse(body: bytes | bytearray, max_items: int) -> PredictRequest:
    """The request for `PREDICT` in ``body``; see `read`."""
    return read(PredictRequest, body, max_items, '{"inputs": "some text"}')


def read(
    form: type[R],
    body: bytes | bytearray,
    max_items: int,
    example: str,
    item_values: int = 8,
    elsewhere: Mapping[str, str] = NOWHERE,
) -> R:
    """The request in ``body``.

    Args:
        max_items: how many items it may have; with many more values than those need, it is not read.
        example: of a body. item_values: how many values an item may have; a pair has 2 strings, 1 bracket and 2 commas.
        elsewhere: for keys that are known to belong elsewhere, what is said of them.

    Raises:
        InputError: it is not JSON, or not of the form; the message says where.
        EmptyInputError: there is no body.
        PayloadTooLargeError: it has too many values.
    """
    if not body or body.isspace():
        raise EmptyInputError(f"the body is empty: send JSON such as {example}")
    most = OTHER_VALUES + item_values * max_items
    if len(body) > most and has_more_values(body, most + _for_messages(body, max_items)):
        raise PayloadTooLargeError(
            f"the body has too many values for the limit of {max_items} items: send smaller batches"
        )
    try:
        return form.model_validate_json(body)
    except ValidationError as e:
        raise InputError(_explain(e, form, elsewhere)) from e


def _for_messages(body: bytes | bytearray, max_items: int) -> int:
    """How many values more than its texts a body may have for messages."""
    return MESSAGE_VALUES * min(body.count(b'"role"'), MESSAGES * max_items)


def items_of(request: PredictRequest) -> tuple[list[Item], bool]:
    """The items of a request, and whether it was a batch (whose answer is a list of lists).

    Raises:
        InputError: a list that is neither a text nor a pair.
    """
    inputs = request.inputs
    if isinstance(inputs, str):
        return [inputs], False
    if not inputs:
        raise EmptyInputError("`inputs` is empty: send at least one text")
    if isinstance(inputs, dict):
        return [as_item(inputs, 0)], False
    first = inputs[0]
    if isinstance(first, str):
        return [_item(inputs, "`inputs`")], False
    if isinstance(first, dict) and "messages" not in first:
        return [Chat.of(inputs, 0)], False
    return [_part(part, number) for number, part in enumerate(inputs)], True


def _part(part: Any, number: int) -> Item:
    if isinstance(part, dict) or (part and isinstance(part[0], dict)):
        return as_item(part, number)
    return _item(part, f"`inputs`: item {number}")


def _item(texts: Any, where: str) -> Item:
    if len(texts) == 1:
        return str(texts[0])
    if len(texts) == 2:
        return (texts[0], texts[1])
    raise InputError(f"{where} is a list of {len(texts)} texts: a text is [a], a pair [a, b], a batch [[a], [b, c]]")


def render(answer: Answer, batch: bool) -> bytes:
    """The body of a successful answer."""
    items = [_rendered(scores) for scores in answer.scores]
    return ("[" + ",".join(items) + "]" if batch else items[0]).encode()


def _rendered(scores: Sequence[Score]) -> str:
    """JSON; the scores are finite, and Python writes such numbers as JSON does."""
    return "[" + ",".join([f'{{"score":{each.score!r},"label":{_quoted(each.label)}}}' for each in scores]) + "]"


@lru_cache(maxsize=4096)
def _quoted(label: str) -> str:
    return json.dumps(label)


def timing_headers(answer: Timing) -> dict[str, str]:
    """TEI's headers: tokens computed, and milliseconds by stage."""
    stages = {
        "x-total-time": answer.total_s,
        "x-tokenization-time": answer.tokenize_s,
        "x-queue-time": answer.queue_s,
        "x-inference-time": answer.compute_s,
    }
    return {"x-compute-tokens": str(answer.tokens)} | {name: f"{s * 1e3:.0f}" for name, s in stages.items()}


TO_CUT = "`truncate` to true"
"""What to set for a text that is too long, as the codec says it and TEI calls it."""


def sentence_of(error: Exception, items: str = "inputs", to_cut: str = TO_CUT) -> str:
    """What is wrong, for the answer of any dialect.

    Args:
        items: the name of the list that the caller has sent. to_cut: the dialect's words for `TO_CUT`.
    """
    if isinstance(error, HTTPException):
        return str(error.detail)
    # A message of our own is written for the caller; anything else may carry what a caller must not see.
    if isinstance(error, ItemError):
        return error.said_of(f"`{items}`: item {error.item}").replace(TO_CUT, to_cut)
    if isinstance(error, TprayError):
        return str(error)
    return f"internal error ({type(error).__name__}); see the server's log"


def render_error(error: Exception, items: str = "inputs") -> Rendered:
    """Status, body and headers for an error. items: as for `sentence_of`."""
    text = sentence_of(error, items)
    if isinstance(error, HTTPException):  # no such route, or not with this method
        return Rendered(error.status_code, _body(text, "Validation"), dict(error.headers or {}))
    status, kind = next((status, kind) for cls, status, kind in ERRORS if isinstance(error, cls))
    return Rendered(
        status, _body(text, kind), _retry_after(error), internal=status == 424 and not isinstance(error, TprayError)
    )


def _retry_after(error: Exception) -> dict[str, str]:
    if isinstance(error, (OverloadedError, GroupError, StoppingError)):
        return {"retry-after": str(error.retry_after_s if isinstance(error, OverloadedError) else RESTART_S)}
    return {}


def _body(text: str, kind: str) -> bytes:
    return ErrorResponse(error=text, error_type=kind).model_dump_json().encode()


def _explain(error: ValidationError, form: type[BaseModel], elsewhere: Mapping[str, str]) -> str:
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    where = first["loc"]
    if not where:
        return "the body must be a JSON object"
    unknown = next((each["loc"] for each in (first, *others) if each["type"] == "extra_forbidden"), None)
    if unknown is not None and first["type"] != "missing":
        name = str(unknown[-1])
        path, known = _path(unknown[:-1], form)
        named = ".".join([*path, name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."])
        return elsewhere.get(name) or f"`{named}` is not known here: leave it out; there are {', '.join(known)}"
    if where[0] == "inputs" and form is PredictRequest:
        wrong = "is missing" if first["type"] == "missing" else "has the wrong type"
        return f"`inputs` {wrong}: send a text, a pair [a, b], a batch [[a], [b, c]], or messages [{{role, content}}]"
    field = form.model_fields.get(str(where[0]))
    if (
        field is not None and field.is_required() and others and first["type"].endswith("_type")
    ):  # none of several forms
        return f"`{where[0]}` has the wrong type: send {field.description}"
    item = next((f": item {part}" for part in where if isinstance(part, int)), "")
    return f"`{'.'.join(_path(where, form)[0])}`{item}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _path(where: Sequence[int | str], form: type[BaseModel]) -> tuple[list[str], Iterable[str]]:
    """The names of the fields on the way to a place, without the classes that pydantic names too; those at its end."""
    path, fields = list[str](), form.model_fields
    for part in where:
        if isinstance(part, str) and part in fields:
            path.append(part)
            inner = next(_forms_in(fields[part].annotation), None)
            fields = {} if inner is None else inner.model_fields
    return path, fields


def _forms_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _forms_in(part)


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers TEI's requests."""
    engine = answering.engine

    async def predict(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_client_batch_size
        asked = parse(body, most)
        items, batch = items_of(asked)
        check_size(len(items), most, "inputs")
        worth()
        answer = await engine.classify(
            items,
            RAW if asked.raw_scores else OWN,
            engine.config.cuts(asked.truncate),
            asked.truncation_direction or "Right",
            deadline,
            Chunks.of(asked.chunks),
        )
        return Rendered(200, render(answer, batch), timing_headers(answer))

    way = Way(predict, DIALECT.answer_error)
    return {PREDICT: answering.handler(lambda _: way)}


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """TEI's routes, as FastAPI documents them."""
    router = APIRouter()

    @router.post(
        PREDICT,
        response_model=list[Prediction] | list[list[Prediction]],
        responses={status: {"model": ErrorResponse} for _, status, _ in ERRORS},
        openapi_extra={
            "requestBody": body_of(PredictRequest),
            "parameters": [ANSWERS_UNTIL],
        },
    )
    async def predict(request: Request) -> Response:
        """Score every label for a text, a pair, a conversation or a batch, best first (TEI's dialect)."""
        return as_response(await answering[PREDICT](request.scope, request.receive))

    return router


DIALECT = Dialect("text-embeddings-inference", handlers, routes, render_error)
