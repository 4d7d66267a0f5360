"""Text to ids and logits to scores, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpray.artifacts.manifest import ModelRecord
from tpray.errors import EmptyInputError, InputError, InputTooLongError
from tpray.serving.codec import TextCodec
from tpray.serving.scores import labelled
from tpray.tokenizer import as_items


@pytest.fixture
def make_codec(make_checkpoint: Callable[..., Path]) -> Callable[[str | None], TextCodec]:
    def make(problem_type: str | None) -> TextCodec:
        record = ModelRecord(
            source="m", revision=None, digest="", model_type="bert", max_length=12, vocab_size=120, token_types=2,
            labels=("a", "b", "c"), problem_type=problem_type, pad_id=0, plan={"rules": []},
        )  # fmt: skip
        return TextCodec(make_checkpoint(), record)

    return make


def test_ids_and_types_are_the_tokenizers(
    make_codec: Callable[[None], TextCodec], make_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint())
    single, pair = make_codec(None).encode(["ab c", ("a", "b c")])
    expected = tokenizer("a", "b c")
    assert single.ids == tokenizer("ab c")["input_ids"]
    assert (pair.ids, pair.types) == (expected["input_ids"], expected["token_type_ids"])


def test_too_long_is_refused_or_cut_at_the_asked_end(make_codec: Callable[[None], TextCodec]) -> None:
    codec, text = make_codec(None), "a b c d e f g h i j k l m n"
    with pytest.raises(InputTooLongError, match="has 16 tokens and this model takes 12"):
        codec.encode([text])
    right, left = (codec.encode([text], True, d)[0].ids for d in ("Right", "Left"))
    assert len(right) == len(left) == 12
    assert right[1] == codec.encode(["a"])[0].ids[1]
    assert left[-2] == codec.encode(["n"])[0].ids[1]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [("", EmptyInputError, "item 1 is empty"), (" \n", EmptyInputError, "empty"), ("a\0", InputError, "NUL"),
     ("a\ud800", InputError, "surrogate")],
)  # fmt: skip
def test_what_no_text_has(
    make_codec: Callable[[None], TextCodec], text: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_codec(None).encode(["fine", text])


@pytest.mark.parametrize("logits", [[0.5, -2.0, 3.0], [1000.0, -1000.0, 999.0]])
def test_the_activation_follows_the_problem_type(
    make_codec: Callable[[str | None], TextCodec], logits: list[float]
) -> None:
    """Catches an overflow to NaN, and softmax on multi-label models."""
    x = np.array(logits, dtype=np.float32)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-wide))
    expected = {
        None: np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum(),
        "multi_label_classification": sigmoid,
        "regression": wide,
    }
    for kind, values in expected.items():
        for row in labelled(np.stack([x, -x, x]), make_codec(kind).record)[::2]:
            scores = {s.label: s.score for s in row}
            np.testing.assert_allclose([scores["a"], scores["b"], scores["c"]], values, rtol=1e-9)
    ordered = [s.score for s in labelled(x[None], make_codec(None).record, "none")[0]]
    assert ordered == sorted(x.tolist(), reverse=True)


@pytest.mark.parametrize("inputs", [None, 1])
def test_what_is_no_list_of_items_is_refused_in_a_sentence(inputs: Any) -> None:
    with pytest.raises(InputError, match=f"there is a {type(inputs).__name__} to classify: send a text"):
        as_items(inputs)
