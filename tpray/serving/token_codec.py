"""For classifiers of tokens: which characters of a text each token of a row is, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpray.artifacts.manifest import ModelRecord
from tpray.errors import InputError, UnsupportedTaskError
from tpray.parallel_layers.tasks import TEXT, TOKEN
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.spelling import compiled_half, read_places
from tpray.tokenizer import Encoded

_INSTEAD = {
    TEXT: "labels texts and not their tokens: ask for /predict, or for classify in Python",
    TOKEN: "labels the tokens of texts: ask for /token_classification, or for classify_tokens in Python",
}


def check_task(record: ModelRecord, task: str) -> None:
    """Raise `UnsupportedTaskError` unless it is the model's."""
    if record.task != task:
        raise UnsupportedTaskError(f"{record.source} {_INSTEAD[record.task]}")


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text: no special one that the tokenizer has added.

    index: its place in the row. word: as the vocabulary has it. start, end: its characters in the text; None: that is
    not known. goes_on: with the word that the token before it is of.
    """

    index: int
    word: str
    start: int | None
    end: int | None
    goes_on: bool


class TokenCodec(TextCodec):
    """A `TextCodec` that finds the tokens of a row again in its text, as transformers' token-classification pipeline.

    Source: transformers/pipelines/token_classification.py (`gather_pre_entities`).
    """

    @cached_property
    def _half(self) -> Any:
        """See `compiled_half`."""
        return compiled_half(self)

    @property
    def knows_words(self) -> bool:
        """Whether characters, and so words, are known."""
        return self._half is not None

    def join(self, words: Sequence[str]) -> str:
        """What the vocabulary's words say together."""
        if self._half is None:
            said: str = self._stock.convert_tokens_to_string(list(words))
            return said
        decoder = self._half.decoder
        return " ".join(words) if decoder is None else decoder.decode(list(words))

    def tokens_of(self, text: str, row: Encoded, direction: Direction | None, number: int) -> list[Token]:
        """The tokens that ``row`` has of item ``number``, a text that may have been cut.

        Raises:
            InputError: they are not found in it.
        """
        ids, offsets = read_places(self, text)
        template = self._templates[0] if self._templates else None
        kept = len(row) - template.added if template else -1
        cut = max(0, len(ids) - kept) if (direction or self._own_side) == "Left" else 0
        first = len(template.around[0]) if template else 0
        if template is None or row.ids[first : first + kept] != ids[cut : cut + kept]:
            raise InputError(
                "has tokens that its tokenizer does not find in it again, so that none is labelled", number
            )
        places = None if offsets is None else offsets[cut : cut + kept]
        return [
            self._token(first + i, token_id, text, None if places is None else places[i])
            for i, token_id in enumerate(ids[cut : cut + kept])
        ]

    def _token(self, index: int, token_id: int, text: str, place: tuple[int, int] | None) -> Token:
        if place is None:
            return Token(index, self._stock.convert_ids_to_tokens(token_id), None, None, goes_on=False)
        start, end = place
        word: str = self._half.id_to_token(token_id)
        if token_id == self._unknown:
            return Token(index, text[start:end], start, end, goes_on=False)
        if getattr(self._half.model, "continuing_subword_prefix", None):
            goes_on = len(word) != end - start
        else:
            goes_on = start > 0 and " " not in text[start - 1 : start + 1]
        return Token(index, word, start, end, goes_on)

    @cached_property
    def _unknown(self) -> int | None:
        """The id of the token for what the vocabulary lacks."""
        named = self.facts.special.get("unk_token")
        found: int | None = None if named is None else self._half.token_to_id(named)
        return found
