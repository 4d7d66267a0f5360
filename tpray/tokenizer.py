"""transformers' tokenizer of a checkpoint: loaded, checked, its files found, and called as transformers calls it.

What a text becomes is transformers' to say. `stock_rows` asks it; `tpray.serving.codec` is faster, and is held against
this when it is made. No torch: a replica need not wait for its import.

Source: transformers/tokenization_utils_base.py (names of files, what a call returns).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpray.chat import Chat, Rendered
from tpray.errors import CheckpointError, EmptyInputError, InputError

Array = npt.NDArray[np.int64]

Plain = str | tuple[str, str]
"""A text, or a pair of texts that the model reads together."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as token ids, special ones included; its token types are zeros."""

    ids: tuple[int, ...]

    def row(self, vocab_size: int, number: int, most: int, way: str | None) -> Encoded:
        """The row of item ``number``, cut to ``most`` tokens at the end that ``way`` names; None: whatever it has.

        Raises:
            EmptyInputError, InputError: there are none, or one that the model does not know.
        """
        if not self.ids:
            raise EmptyInputError("is empty: send at least one token id", number)
        place = next((place for place, token in enumerate(self.ids) if not 0 <= token < vocab_size), None)
        if place is not None:
            raise InputError(
                f"has the token id {str(self.ids[place])[:24]} at position {place}, and this model knows those from 0 "
                f"to {vocab_size - 1}: send ids of its own tokenizer",
                number,
            )
        kept = self.ids if way is None else self.ids[-most:] if way == "Left" else self.ids[:most]
        return Encoded(list(kept), [0] * len(kept))


Item = Plain | Chat | Tokens
"""One of these, a conversation, or a text as token ids."""


def as_item(value: Any, number: int | None = None) -> Item:
    """Item ``number`` of what Python code sends: besides an `Item`, ``{"messages": [...]}`` or a list of messages.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, (str, Chat)):
        return value
    if isinstance(value, Mapping):
        if set(value) != {"messages"}:
            raise InputError('is an object: a conversation is {"messages": [...]}, or a list of messages', number)
        return Chat.of(value["messages"], number)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(text, str) for text in value):
        return (value[0], value[1])
    if isinstance(value, list):
        return Chat.of(value, number)
    raise InputError("is neither a text, a pair of texts, nor a conversation", number)


def as_items(inputs: Any) -> tuple[list[Item], bool]:
    """What Python code sends, and whether it is a single item: no list, or a list of messages.

    Raises:
        InputError: one of them is no item.
    """
    if not isinstance(inputs, (str, tuple, Chat, Mapping)):
        if not isinstance(inputs, Iterable):
            raise InputError(f"there is a {type(inputs).__name__} to classify: send a text, a pair (a, b), or a list")
        inputs = list(inputs)
        if not (inputs and isinstance(inputs[0], Mapping) and "role" in inputs[0]):
            return [as_item(value, number) for number, value in enumerate(inputs)], False
    return [as_item(inputs, 0)], True


def texts_of(item: Plain | Tokens) -> tuple[str, ...]:
    """The one text, or the two, of an item; none of one that is tokens."""
    return (item,) if isinstance(item, str) else () if isinstance(item, Tokens) else item


def check_text(text: str, number: int | None, what: str = "") -> None:
    """Refuse what no text has, in item ``number``; without one, the sentence begins with ``what``.

    Raises:
        EmptyInputError, InputError: it is empty, or has characters that no text has.
    """
    if not text or text.isspace():
        raise EmptyInputError(f"{what}is empty: send some text", number)
    position = text.find("\0")
    if position >= 0:
        raise InputError(f"{what}has a NUL character at position {position}: remove it", number)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"{what}has half of a surrogate pair, or a byte that is not UTF-8, at position {e.start}: send valid "
            "Unicode",
            number,
        ) from e


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row before padding: token ids and token types, both of its length in tokens."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def pad(rows: Sequence[Encoded], pad_id: int) -> tuple[Array, Array, Array]:
    """``input_ids``, ``attention_mask``, ``token_type_ids``, int64 ``[B, S]``, S the longest row's length."""
    shape = len(rows), max(len(row) for row in rows)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = 1
        types[i, : len(row)] = row.types
    return ids, mask, types


def load_tokenizer(directory: Path, source: str) -> Any:
    """transformers' tokenizer in ``directory``, which belongs to the model that the user calls ``source``.

    Raises:
        CheckpointError: there is none, it needs code of its own, or its vocabulary is empty.
    """
    from transformers import AutoTokenizer

    _refuse_own_code(directory, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers, tokenizers, sentencepiece and json raise what they like
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source} has no tokenizer that transformers can load ({said}): put its tokenizer.json, or the files "
            "that its tokenizer class names, beside config.json"
        ) from e
    limit = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > special:
        raise CheckpointError(
            f"{source}: model_max_length in tokenizer_config.json is {limit!r}, and it is a number of tokens, more "
            f"than the {special} special ones of a pair: correct it"
        )
    words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        names = ", ".join(sorted(set(type(tokenizer).vocab_files_names.values())))
        raise CheckpointError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) has no words, so that every text would be unknown "
            f"to it: put its vocabulary ({names}) beside config.json"
        )
    return tokenizer


def _refuse_own_code(directory: Path, source: str) -> None:
    """transformers would take another tokenizer in its place, without a word."""
    import transformers

    try:
        stored = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # transformers has words for that
        return
    if not isinstance(stored, dict) or "AutoTokenizer" not in (stored.get("auto_map") or {}):
        return
    name = str(stored.get("tokenizer_class"))
    if not any(hasattr(transformers, each) for each in (name, name.removesuffix("Fast"))):
        raise CheckpointError(
            f"{source} has a tokenizer in code of its own ({name}; auto_map in tokenizer_config.json), which tpray "
            "does not run: save it with a tokenizer class of transformers"
        )


def longest_row(tokenizer: Any, max_length: int) -> int:
    """The tokens of the longest row: what the model takes, or less if the tokenizer says so."""
    return int(min(max_length, tokenizer.model_max_length))


def check_vocabulary(tokenizer: Any, vocab_size: int, source: str) -> None:
    """Refuse a tokenizer whose vocabulary cannot be the model's; an added token beyond it is its texts' error.

    Raises:
        CheckpointError: words of the tokenizer have ids that the embedding lacks.
    """
    added = tokenizer.get_added_vocab()
    beyond = sorted((i, word) for word, i in tokenizer.get_vocab().items() if i >= vocab_size and word not in added)
    if beyond:
        raise CheckpointError(
            f"{source}: its tokenizer has {len(beyond)} words that the model's vocabulary of {vocab_size} lacks, "
            f"{beyond[0][1]!r} with the id {beyond[0][0]} among them: it belongs to another model"
        )


def tokenizer_files(tokenizer: Any, directory: Path) -> list[Path]:
    """The files in ``directory`` that a tokenizer was loaded from, or that change what it does."""
    import transformers.tokenization_utils_base as base
    from transformers import PreTrainedTokenizerFast

    names = {value for name, value in vars(base).items() if name.endswith("_FILE") and isinstance(value, str)}
    for kind in (*type(tokenizer).__mro__, PreTrainedTokenizerFast):
        names |= set(getattr(kind, "vocab_files_names", {}).values())
    names |= {Path(str(value)).name for key, value in tokenizer.init_kwargs.items() if key.endswith("_file") and value}
    return sorted(path for name in names if (path := directory / name).is_file())


def takes_types(tokenizer: Any) -> bool:
    """Whether transformers gives the model the tokenizer's token types, rather than none."""
    return "token_type_ids" in tokenizer.model_input_names


def stock_rows(
    tokenizer: Any,
    items: Sequence[Plain],
    max_length: int | None = None,
    side: str = "right",
    cut: bool | str = True,
) -> list[Encoded]:
    """What transformers makes of each item by itself; the types are zeros where it gives the model none.

    max_length: cut longer items, from the end that ``side`` names; None: whatever length they have. cut: what of a
    pair, by transformers' names; True is ``longest_first``.
    """
    settings = {"verbose": False, "truncation": max_length is not None and cut, "max_length": max_length}
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        made = [
            tokenizer(*texts_of(item), add_special_tokens=not isinstance(item, Rendered), **settings) for item in items
        ]
    finally:
        tokenizer.truncation_side = before
    zeros = [[0] * len(row["input_ids"]) for row in made]
    return [
        Encoded(list(row["input_ids"]), list(row.get("token_type_ids", none)))
        for row, none in zip(made, zeros, strict=True)
    ]


def sample_items(tokenizer: Any) -> list[Plain]:
    """Texts that show what a tokenizer does: cases, accents, scripts, spaces, a pair, and its own special tokens."""
    special = [token for token in tokenizer.all_special_tokens if token.strip()][:3]
    samples: list[Plain] = [
        "The quick brown fox jumps over the lazy dog, 42 times.",
        "Ça n'est pas vrai — “naïve” É",
        "你好 мир 🙂",
        "  two  spaces\tand\nlines ",
        ("a first text", "and its pair"),
    ]
    return [*samples, *(f"before {token} after" for token in special)]
