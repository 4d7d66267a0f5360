"""Long texts are tokenised only as far as it matters, and have the ids that transformers gives them all the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.text_kinds import DISTINCT, LINES, RESIDUES, WORDS, save_tokenizer
from tpray.artifacts.manifest import ModelRecord
from tpray.errors import DeadlineError, EmptyInputError, InputTooLongError
from tpray.serving import codec as codec_module
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.joints import Joints
from tpray.serving.template import kept
from tpray.tokenizer import Plain, load_tokenizer, stock_rows

LIMIT = 12
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]

_UNICODE = (
    "éÉßøλΣςжЯ你好世界かなカナ한국ابגדहिนทิ½²…—“”🙂👩🚀🇨🇭ﬁ"
    "\u0301\u0308\u200b\u200d\u00a0\u3000\u2028\uff9e\u1161\U0001f3fb"
)
_MARKS = "!?.,;:'\"`()[]<>|-_/\\#$"
_SPACES = (" ", " ", " ", "  ", "   ", "\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000", " " * 40)


@pytest.fixture
def make_codec(tmp_path: Path) -> Callable[..., TextCodec]:
    def make(kind: str, max_length: int = LIMIT) -> TextCodec:
        save_tokenizer(tmp_path, kind)
        record = ModelRecord(
            source="m", revision=None, digest="", model_type=kind, max_length=max_length, labels=("a",), token_types=2,
            vocab_size=100_000, problem_type=None, pad_id=0, plan={"rules": []},
        )  # fmt: skip
        return TextCodec(tmp_path, record)

    return make


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are long from 16 characters on, so that small ones have many parts."""
    monkeypatch.setattr(codec_module, "WHOLE_CHARS", 16)
    monkeypatch.setattr(codec_module, "PART_CHARS", 8)


def text(rng: random.Random, special: list[str]) -> str:
    """From one character to some twenty times as many tokens as fit, of one style or a mixture.

    Not longer: transformers' own cut of a pair takes gigabytes for texts of a few thousand tokens.
    """
    styles: list[Callable[[], str]] = [
        lambda: rng.choice(WORDS) + rng.choice(_SPACES),
        lambda: rng.choice(WORDS) + " ",
        lambda: rng.choice(LINES).title() + " ",
        lambda: rng.choice(_UNICODE),
        lambda: rng.choice(_UNICODE) + " ",
        lambda: rng.choice(_MARKS),
        lambda: rng.choice("!!!!``''--"),
        lambda: rng.choice(RESIDUES),
        lambda: str(rng.randrange(10**6)),
        lambda: rng.choice("abcDEF0123"),
        lambda: rng.choice(_SPACES),
        lambda: rng.choice("你好世界中文") * rng.randrange(1, 4),
        lambda: rng.choice(special or ["a"]) + rng.choice(("", " ", "a", "!")),
    ]
    mixed = rng.random() < 0.5
    chosen = rng.sample(styles, rng.randrange(2, 6)) if mixed else [rng.choice(styles)]
    pieces = int(20 * LIMIT * rng.random() ** 2) + 1
    made = "".join(rng.choice(chosen)() for _ in range(pieces))[: 40 * LIMIT]
    return made if made.strip() else made + "a"


def items(seed: int, special: list[str]) -> Iterator[Plain]:
    """A few for the first seed, more for those of the slow tests."""
    rng = random.Random(seed)
    for _ in range(20 if seed else 5):
        yield text(rng, special)
        yield (text(rng, special), text(rng, special))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", DISTINCT)
@pytest.mark.usefixtures("short_parts")
def test_ids_are_those_of_transformers_however_long_the_text(
    kind: str, seed: int, make_codec: Callable[..., TextCodec], tmp_path: Path
) -> None:
    codec = make_codec(kind, LIMIT + seed % 2)
    tokenizer: Any = load_tokenizer(tmp_path, "m")
    special = [*tokenizer.all_special_tokens, *list(tokenizer.get_added_vocab())[:8]]
    ways: tuple[Direction, ...] = ("Left", "Right")
    for item in items(seed, special):
        for way in ways:
            (expected,) = stock_rows(tokenizer, [item], codec.max_length, way.lower())
            if not expected.ids:
                with pytest.raises(EmptyInputError):
                    codec.encode([item], True, way)
                continue
            assert codec.encode([item], True, way) == [expected], (item, way)
        (whole,) = stock_rows(tokenizer, [item])
        if len(whole) > codec.max_length:
            with pytest.raises(InputTooLongError):
                codec.encode([item])
        elif whole.ids:
            assert codec.encode([item]) == [whole], item


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "gpt2", "xlm"])
@pytest.mark.usefixtures("short_parts")
def test_no_more_is_tokenised_than_matters(
    kind: str, make_codec: Callable[..., TextCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_codec(kind)
    seen: list[str] = []
    tokens = codec._tokens

    def count(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return tokens(texts)

    monkeypatch.setattr(codec, "_tokens", count)
    item = ("the train leaves " * 1000, "good morning " * 1000)
    assert len(codec.encode([item[0]], True)[0]) == LIMIT
    with pytest.raises(InputTooLongError, match="has more than 12 tokens and this model takes 12"):
        codec.encode([item[0]])
    assert sum(map(len, seen)) < 500


def test_exact_counts_for_texts_of_modest_length(make_codec: Callable[..., TextCodec]) -> None:
    with pytest.raises(InputTooLongError, match="has 2002 tokens"):
        make_codec("bert").encode(["a " * 2000])


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_long_run_of_spaces_is_no_reason_to_cut(kind: str, make_codec: Callable[..., TextCodec]) -> None:
    codec = make_codec(kind, 100_000)
    text = "the" + " " * 50_000 + "train"
    assert codec.encode([text]) == stock_rows(codec._stock, [text])


def test_tokenising_ends_with_its_deadline(make_codec: Callable[..., TextCodec]) -> None:
    with pytest.raises(DeadlineError, match="send less text"):
        make_codec("bert").encode(["a " * 10_000], True, deadline=time.monotonic() - 1)


def test_what_is_kept_of_a_pair_is_what_transformers_keeps() -> None:
    """Against the loops that the two libraries' rules stand for, token by token."""

    def one_by_one(first: int, second: int, room: int, odd_first: bool) -> tuple[int, int]:
        while first + second > room:
            if first > second or (first == second and not odd_first):
                first -= 1
            else:
                second -= 1
        return first, second

    for room in range(1, 9):
        for first in range(20):
            for second in range(20):
                assert kept((first, second), room, True) == one_by_one(first, second, room, first > second)
                assert kept((first, second), room, False) == one_by_one(first, second, room, True)
        assert kept((room + 3,), room, True) == (room,)


def test_characters_that_can_be_one_token_are_not_parted_where_words_are_not_known() -> None:
    """A tokenizer in Python says no words, and characters chosen at random make none of its vocabulary."""
    known = {"北京": 1, "中国": 2}

    def tokens_of(texts: Sequence[str]) -> list[list[int]]:
        found = []
        for text in texts:
            ids, at = [], 0
            while at < len(text):
                word = next((word for word in known if text.startswith(word, at)), text[at])
                ids += [] if word == " " else [known.get(word, 100 + ord(word[0]))]
                at += len(word)
            found.append(ids)
        return found

    joints = Joints(tokens_of, None, [], greedy=False)
    text = "中国北京" * 500
    for from_end in (False, True):
        assert list(joints.parts(text, 255, 4096, from_end)) == [text]
    spaced = "a b " * 500 + "c"
    parts = list(joints.parts(spaced, 255, 4096))
    assert len(parts) > 1
    assert "".join(parts) == spaced
