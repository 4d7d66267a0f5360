"""OpenAI's form of every error."""

from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException

from tpray import errors
from tpray.serving.dialects.openai_errors import render_error


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "words"),
    [
        (errors.UnknownModelError("no such model"), 404, "NotFoundError", "model", "no such model"),
        (errors.InputError("is bad", 3), 400, "BadRequestError", "input", "`input`: item 3 is bad"),
        (errors.UnsupportedTaskError("has labels"), 400, "BadRequestError", None, "has labels"),
        (errors.PayloadTooLargeError("is large"), 413, "BadRequestError", None, "is large"),
        (errors.UnauthorizedError("no key"), 401, "AuthenticationError", None, "no key"),
        (errors.OverloadedError("is full", 7), 429, "RateLimitError", None, "is full"),
        (errors.NotReadyError("restarts"), 503, "ServiceUnavailableError", None, "restarts"),
        (errors.StoppingError("stops"), 503, "ServiceUnavailableError", None, "stops"),
        (errors.DeadlineError("late"), 504, "TimeoutError", None, "late"),
        (errors.LogitsError("has NaN", 1), 424, "UnprocessableError", "input", "`input`: item 1 has NaN"),
        (HTTPException(404, "Not Found"), 404, "NotFoundError", None, "Not Found"),
        (RuntimeError("secret"), 500, "InternalServerError", None, "internal error (RuntimeError)"),
    ],
)
def test_each_error_has_its_status_and_type(
    error: Exception, status: int, kind: str, param: str | None, words: str
) -> None:
    answer = render_error(error)
    said = json.loads(answer.body)["error"]
    assert (answer.status, said["code"], said["type"], said["param"]) == (status, status, kind, param)
    assert words in said["message"]
    assert "secret" not in said["message"]
    assert answer.internal == (status == 500)
    assert answer.headers.get("retry-after") == {429: "7", 503: "5"}.get(status)
