"""The TEI dialect: forms of a request, and what each mistake is told."""

from __future__ import annotations

import json

import pytest

from tpray import errors
from tpray.serving.dialects import tei


@pytest.mark.parametrize(
    ("inputs", "items", "batch"),
    [("a", ["a"], False), (["a"], ["a"], False), (["a", "b"], [("a", "b")], False),
     ([["a"], ["b", "c"]], ["a", ("b", "c")], True)],
)  # fmt: skip
def test_forms_of_inputs(inputs: object, items: list[object], batch: bool) -> None:
    assert tei.items_of(tei.parse(json.dumps({"inputs": inputs}).encode(), 32)) == (items, batch)


def test_options_may_be_null_and_a_direction_in_any_case() -> None:
    options = ("raw_scores", "truncate", "truncation_direction", "chunks")
    asked = tei.parse(json.dumps({"inputs": "a"} | dict.fromkeys(options)).encode(), 32)
    assert [getattr(asked, option) for option in options] == [None] * 4
    for direction in ("left", "Left", "LEFT"):
        body = json.dumps({"inputs": "a", "truncation_direction": direction})
        assert tei.parse(body.encode(), 32).truncation_direction == "Left"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 422, "not valid JSON"),
        (b"\xff", 422, "not valid JSON"),
        (b"", 400, "body is empty"),
        (b"[]", 422, "JSON object"),
        (b'{"inputs": 3}', 422, "`inputs` has the wrong type"),
        (b'{"inputs": [1, 2]}', 422, "`inputs` has the wrong type"),
        (b'{"inputs": []}', 400, "`inputs` is empty"),
        (b'{"inputs": [[]]}', 422, "list of 0 texts"),
        (b'{"inputs": ["a", "b", "c"]}', 422, "list of 3 texts"),
        (b'{"inputs": "\\ud800"}', 422, "not valid JSON"),
        (b'{"text": "a"}', 422, "`inputs` is missing"),
        (b'{"inputs": "a", "truncate": "maybe"}', 422, "`truncate`"),
        (b'{"inputs": "a", "truncate": 1}', 422, "`truncate`: input should be a valid boolean"),
        (b'{"inputs": "a", "truncation_direction": "Up"}', 422, "`truncation_direction`: input should be 'Left' or"),
        (
            b'{"inputs": "a", "raw_score": true}',
            422,
            "`raw_score` is not known here: leave it out; there are inputs",
        ),
        (
            b'{"inputs": "a", "chunks": {"strides": 3}}',
            422,
            "`chunks.strides` is not known here: leave it out",
        ),
        (b'{"inputs": "a", "' + b"k" * 9000 + b'": 1}', 422, "kkk...` is not known here"),
        (b'{"inputs": "a", "chunks": {"stride": "b"}}', 422, "`chunks.stride`: input should be a valid integer"),
    ],
)
def test_mistakes_are_explained(body: bytes, status: int, words: str) -> None:
    with pytest.raises(errors.InputError) as caught:
        tei.items_of(tei.parse(body, 32))
    found, rendered, *_ = tei.render_error(caught.value)
    assert found == status
    assert set(json.loads(rendered)) == {"error", "error_type"}
    assert words in json.loads(rendered)["error"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(errors.PayloadTooLargeError("x"), 413, "Validation"), (errors.OverloadedError("x"), 429, "Overloaded"),
     (errors.StepError("x"), 424, "Backend"), (errors.RefusedError("x"), 424, "Backend"),
     (errors.RankError("x"), 503, "Unhealthy"), (errors.DeadlineError("x"), 504, "Backend"),
     (ZeroDivisionError("secret"), 424, "Backend")],
)  # fmt: skip
def test_the_table_of_statuses(error: Exception, status: int, kind: str) -> None:
    found, body, headers, internal, _ = tei.render_error(error)
    assert (found, json.loads(body)["error_type"]) == (status, kind)
    assert ("retry-after" in headers) == (status in (429, 503))
    assert internal == (type(error) is ZeroDivisionError)
    assert b"secret" not in body


def test_an_overloaded_server_says_when_to_come_back() -> None:
    assert tei.render_error(errors.OverloadedError("try again later", 17)).headers == {"retry-after": "17"}
