"""Texts that are longer than a model takes, read in overlapping chunks, whose scores become one.

A chunk is a row of its own: the tokens of a part of the text, special ones around them, before them the whole first
text if it is a pair's second. The parts are those of transformers' tokenizers with ``return_overflowing_tokens``
(tokenizers/src/tokenizer/encoding.rs, `truncate`): each has as many tokens as there is room for, and begins so many
behind the one before that they share ``stride``; the last one has what is left. From the left they are made from the
text's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tpray.errors import InputError, PayloadTooLargeError
from tpray.group.wire import Array
from tpray.tokenizer import Encoded

STRIDE_SHARE = 8
"""Unless a request says otherwise, chunks share an eighth of what one holds: of 512 tokens some three sentences."""


class Chunks(BaseModel):
    """How long texts are read in chunks. A text that fits is one chunk, and has the scores that it has without."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stride: int | None = Field(
        None, ge=0, description="tokens that a chunk shares with the one before; null: an eighth of what a chunk holds"
    )
    aggregate: Literal["max", "mean"] = Field(
        "max", description="of each score of a text's chunks: the greatest, or the mean; raw scores are logits here too"
    )
    max_chunks: int = Field(16, ge=1, le=256, description="of a text; one that has more is too long")

    @classmethod
    def of(cls, value: Any) -> Chunks | None:
        """What a caller says: true or false, an object with these fields, or None.

        Raises:
            InputError: it is none of these.
        """
        if value is None or value is False:
            return None
        if isinstance(value, cls):
            return value
        if value is not True and not isinstance(value, Mapping):
            raise InputError(f"chunks is {value!r}: give true, or an object with {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate({} if value is True else dict(value))
        except ValidationError as e:
            first = e.errors(include_url=False, include_context=False, include_input=False)[0]
            raise InputError(f"chunks.{first['loc'][0]}: {first['msg'][:1].lower()}{first['msg'][1:]}") from e

    def step(self, room: int) -> int:
        """By how many tokens a chunk begins behind the one before, where a chunk holds ``room``, at least 1.

        Raises:
            InputError: the stride leaves none.
        """
        stride = room // STRIDE_SHARE if self.stride is None else self.stride
        if stride >= room:
            raise InputError(f"chunks share {stride} tokens (stride) and hold {room}: give a smaller stride")
        return room - stride

    def reach(self, room: int) -> int:
        """How many tokens of a text all its chunks hold together at most."""
        return room + (self.max_chunks - 1) * self.step(room)

    def cut(self, ids: list[int], room: int, from_end: bool) -> list[list[int]]:
        """The tokens of each chunk, at least one; ids: at most `reach` tokens."""
        step, length = self.step(room), len(ids)
        starts = range(0, max(1, length - room + step), step)
        if from_end:
            return [ids[max(0, length - start - room) : length - start] for start in starts]
        return [ids[start : start + room] for start in starts]

    def aggregated(self, values: Array, of: Sequence[int]) -> Array:
        """The value of each text. values: ``[R]`` or ``[R, L]``, of chunks; of: the number of each one's text."""
        count = max(of) + 1
        result = np.full((count, *values.shape[1:]), -np.inf if self.aggregate == "max" else 0.0)
        if self.aggregate == "max":
            np.maximum.at(result, of, values)
            return result
        np.add.at(result, of, values)
        chunks = np.bincount(of, minlength=count).astype(np.float64)
        mean: Array = result / chunks.reshape(-1, *[1] * (values.ndim - 1))
        return mean


WHOLE = Chunks(max_chunks=1, stride=0)
"""A text is one row, and what is longer is too long."""


def check_count(count: int, most: float) -> None:
    """Refuse more chunks than may wait.

    Raises:
        PayloadTooLargeError: there are more.
    """
    if count > most:
        raise PayloadTooLargeError(
            f"these texts make more than {most} chunks, and no more may wait (--max-concurrent-requests): send fewer, "
            "or shorter ones, or a smaller stride"
        )


def numbered(chunks: Sequence[Sequence[Encoded]], of: list[int]) -> list[Encoded]:
    """The rows of all items, by their lengths; the number of each one's item comes into ``of``."""
    rows = sorted(
        ((number, row) for number, of_one in enumerate(chunks) for row in of_one), key=lambda each: len(each[1])
    )
    of.extend(number for number, _ in rows)
    return [row for _, row in rows]
