"""OpenAI's form of an error, which vLLM and Infinity answer with too; and what refuses keys that are not known.

Source: vLLM (entrypoints/serve/utils/error_response.py; ErrorInfo: message, type, param, code). Deliberate difference:
what the model makes of one item, such as logits that are not finite, is 424 and not 500: openai's client sends what got
a 500 twice more.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from tpray.errors import (
    DeadlineError,
    GroupError,
    InputError,
    ItemError,
    MisdirectedError,
    OverloadedError,
    PayloadTooLargeError,
    StoppingError,
    UnauthorizedError,
    UnknownModelError,
)
from tpray.serving.dialects import tei
from tpray.serving.dialects.base import Rendered

BAD_REQUEST, UNAVAILABLE = "BadRequestError", "ServiceUnavailableError"

ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownModelError, 404, "NotFoundError"),
    (PayloadTooLargeError, 413, BAD_REQUEST),
    (InputError, 400, BAD_REQUEST),
    (MisdirectedError, 421, BAD_REQUEST),
    (UnauthorizedError, 401, "AuthenticationError"),
    (OverloadedError, 429, "RateLimitError"),
    (StoppingError, 503, UNAVAILABLE),
    (GroupError, 503, UNAVAILABLE),
    (DeadlineError, 504, "TimeoutError"),
    (ItemError, 424, "UnprocessableError"),
    (Exception, 500, "InternalServerError"),
)
"""From errors to statuses and types; the first that matches."""


class ErrorInfo(BaseModel):
    """What went wrong. param: the field that is at fault, where one is. code: the status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: ErrorInfo


RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for _, status, _ in ERRORS}
"""For OpenAPI."""


def render_error(error: Exception, items: str = "input") -> Rendered:
    """Status, body and headers for an error. items: the name of the list that the caller has sent."""
    said = tei.sentence_of(error, items, "`truncate_prompt_tokens` to -1")
    if isinstance(error, HTTPException):
        status, kind = error.status_code, "NotFoundError" if error.status_code == 404 else BAD_REQUEST
    else:
        status, kind = next((status, kind) for cls, status, kind in ERRORS if isinstance(error, cls))
    info = ErrorInfo(message=said, type=kind, param=_param(error, items), code=status)
    return tei.render_error(error)._replace(status=status, body=ErrorResponse(error=info).model_dump_json().encode())


def _param(error: Exception, items: str) -> str | None:
    if isinstance(error, UnknownModelError):
        return "model"
    if isinstance(error, ItemError) and error.item is not None:
        return items
    cause = error.__cause__
    if isinstance(cause, ValidationError) and (where := cause.errors()[0]["loc"]):
        return str(where[0])
    return None


def check_keys(asked: BaseModel) -> None:
    """Refuse keys that a form with ``extra="allow"`` does not know; one that is null says nothing.

    Raises:
        InputError: it names the first.
    """
    unknown = [name for name, value in (asked.model_extra or {}).items() if value is not None]
    if unknown:
        known = ", ".join(type(asked).model_fields)
        raise InputError(f"`{unknown[0]}` is not known here: leave it out; there are {known}")
