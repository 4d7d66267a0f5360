"""The TEI dialect: ``POST /tokenize`` and ``POST /decode``.

Source: https://huggingface.github.io/text-embeddings-inference (TokenizeRequest, DecodeRequest; ``start`` and ``stop``
count bytes, core/src/tokenization.rs). Deliberate differences: a request has 131072 characters at most, and of many at
once some get 429; a token id that the tokenizer lacks is refused, and not left out; a key that is not known is refused
by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tpray.errors import EmptyInputError, OverloadedError, PayloadTooLargeError
from tpray.serving.codec import LARGE_CHARS
from tpray.serving.dialects.base import (
    ANSWERS_UNTIL,
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
from tpray.serving.dialects.tei import ERRORS, ErrorResponse, read, render_error
from tpray.serving.spelling import decoded, spelled

TOKENIZE, DECODE = "/tokenize", "/decode"

AT_ONCE = 16
"""How many of these requests are worked on at once: the threads are those that tokenise texts for the model."""

TokenId = Annotated[int, Field(ge=0)]


class TokenizeRequest(Form):
    """The body of ``POST /tokenize``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "What is Paris?"}]})

    inputs: str | list[str] = Field(description="a text, or a list of them")
    add_special_tokens: Flag = Field(None, description="with those that the tokenizer adds; null: yes")
    prompt_name: None = Field(None, description="null: there are no prompts here")


class SimpleToken(BaseModel):
    """One token; start and stop are its bytes in the text, which special tokens have none of."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class DecodeRequest(Form):
    """The body of ``POST /decode``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ids": [2, 20, 30, 3]}]})

    ids: list[TokenId] | list[list[TokenId]] = Field(
        description="token ids, such as [2, 20, 3], or a list of such lists"
    )
    skip_special_tokens: Flag = Field(None, description="leave special tokens out; null: yes")


def handlers(answering: Answering) -> dict[str, Handler]:
    """What answers these requests."""
    engine, under_way = answering.engine, 0

    async def on_thread(work: Callable[[float], bytes], characters: int, deadline: float) -> Rendered:
        nonlocal under_way
        if under_way >= AT_ONCE:
            raise OverloadedError(f"{AT_ONCE} such requests are under way, and no more are taken: try again later")
        under_way += 1
        try:
            return Rendered(200, await engine.tokenizing.run(work, characters, deadline))
        finally:
            under_way -= 1

    def check_count(count: int, what: str) -> None:
        if not count:
            raise EmptyInputError(f"`{what}` is empty: send at least one")
        check_size(count, engine.config.max_client_batch_size, what)

    async def tokenize(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        asked = read(TokenizeRequest, body, engine.config.max_client_batch_size, '{"inputs": "some text"}')
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        check_count(len(texts), "inputs")
        characters = sum(map(len, texts))
        if characters > LARGE_CHARS:
            raise PayloadTooLargeError(
                f"`inputs` has {characters} characters and the limit is {LARGE_CHARS} here: send shorter texts"
            )
        worth()
        special = asked.add_special_tokens is not False

        def work(_: float) -> bytes:
            found = [[asdict(t) for t in spelled(engine.codec, text, special, i)] for i, text in enumerate(texts)]
            return json.dumps(found, ensure_ascii=False).encode()

        return await on_thread(work, characters, deadline)

    async def decode(body: bytearray, deadline: float, worth: Callable[[], None]) -> Rendered:
        most = engine.config.max_client_batch_size * engine.codec.max_length
        asked = read(DecodeRequest, body, most, '{"ids": [2, 20, 3]}')
        lists = [each for each in asked.ids if isinstance(each, list)]
        ids = lists or [[each for each in asked.ids if isinstance(each, int)]]
        check_count(len(ids) if asked.ids else 0, "ids")
        worth()
        skip = asked.skip_special_tokens is not False

        def work(_: float) -> bytes:
            return json.dumps([decoded(engine.codec, own, skip, i) for i, own in enumerate(ids)]).encode()

        return await on_thread(work, len(body), deadline)

    tokenizing = Way(tokenize, DIALECT.answer_error)
    decoding = Way(decode, lambda error: logged(render_error(error, "ids"), error))
    return {TOKENIZE: answering.handler(lambda _: tokenizing), DECODE: answering.handler(lambda _: decoding)}


def routes(answering: Mapping[str, Handler]) -> APIRouter:
    """TEI's routes, as FastAPI documents them."""
    router = APIRouter()
    errors: dict[int | str, dict[str, type[ErrorResponse]]] = {s: {"model": ErrorResponse} for _, s, _ in ERRORS}

    @router.post(
        TOKENIZE,
        response_model=list[list[SimpleToken]],
        responses=errors,
        openapi_extra={"requestBody": body_of(TokenizeRequest), "parameters": [ANSWERS_UNTIL]},
    )
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of each text of a batch (TEI's dialect)."""
        return as_response(await answering[TOKENIZE](request.scope, request.receive))

    @router.post(
        DECODE,
        response_model=list[str],
        responses=errors,
        openapi_extra={"requestBody": body_of(DecodeRequest), "parameters": [ANSWERS_UNTIL]},
    )
    async def decode(request: Request) -> Response:
        """The text of token ids (TEI's dialect)."""
        return as_response(await answering[DECODE](request.scope, request.receive))

    return router


DIALECT = Dialect("text-embeddings-inference, tokens", handlers, routes, render_error)
