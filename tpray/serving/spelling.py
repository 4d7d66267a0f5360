"""The tokens of a text with the characters that they are, and the text of tokens; beside `codec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tpray.errors import EmptyInputError, InputError, UnsupportedTaskError
from tpray.tokenizer import check_text

if TYPE_CHECKING:
    from tpray.serving.codec import TextCodec


@dataclass(frozen=True, slots=True)
class Spelled:
    """One token. special: the tokenizer has added it. start, stop: its bytes in the text, as UTF-8; None: unknown."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


def compiled_half(codec: TextCodec) -> Any:
    """The tokenizer's compiled half, whether the codec asks it for rows or not; None: it is written in Python."""
    if codec._compiled is not None:
        return codec._compiled
    return codec._stock.backend_tokenizer if codec._stock.is_fast else None


def read_places(codec: TextCodec, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """The ids of a text's tokens, without special ones, and which characters each is; None: that is not known."""
    if codec._compiled is not None:
        made = codec._compiled.encode(text, add_special_tokens=False)
        return made.ids, made.offsets
    with codec._lock:
        made = codec._stock(text, add_special_tokens=False, return_offsets_mapping=codec._stock.is_fast, verbose=False)
    return list(made["input_ids"]), made.get("offset_mapping")


def spelled(codec: TextCodec, text: str, special: bool, number: int) -> list[Spelled]:
    """The tokens of item ``number``, however many. special: with those that the tokenizer adds.

    Raises:
        EmptyInputError, InputError: it is no text.
        UnsupportedTaskError: which tokens are special is not known.
    """
    check_text(text, number)
    if special and not codec._templates:
        raise UnsupportedTaskError(
            f"{codec.record.source} has a tokenizer whose rows are not taken apart: set `add_special_tokens` to false"
        )
    ids, places = read_places(codec, text)
    before, after = (row.ids for row in codec._templates[0].around) if special else ([], [])
    named = _names(codec)
    starts = list(range(len(text) + 1)) if text.isascii() else [0, *accumulate(len(c.encode()) for c in text)]
    own = (
        [Spelled(i, named(i), False, None, None) for i in ids]
        if places is None
        else [
            Spelled(i, text[start:end], False, starts[start], starts[end])
            for i, (start, end) in zip(ids, places, strict=True)
        ]
    )
    first, last = ([Spelled(i, named(i), True, None, None) for i in ids] for ids in (before, after))
    return [*first, *own, *last]


def decoded(codec: TextCodec, ids: Sequence[int], skip_special: bool, number: int) -> str:
    """The text of the tokens in list ``number``.

    Raises:
        EmptyInputError, InputError: there are none, or one that the tokenizer lacks.
    """
    if not ids:
        raise EmptyInputError("is empty: send some token ids", number)
    named = _names(codec)
    unknown = next((i for i in ids if not 0 <= i < codec.record.vocab_size or named(i) is None), None)
    if unknown is not None:
        raise InputError(f"has the token id {unknown}, which the tokenizer lacks: leave it out", number)
    half = compiled_half(codec)
    if half is not None:
        said: str = half.decode(list(ids), skip_special_tokens=skip_special)
        return said
    with codec._lock:
        said = codec._stock.decode(list(ids), skip_special_tokens=skip_special)
    return said


def _names(codec: TextCodec) -> Any:
    half = compiled_half(codec)
    return codec._stock.convert_ids_to_tokens if half is None else half.id_to_token
