"""What a tokenizer puts around the tokens of a text or a pair, and how much of each it keeps.

Sources: tokenizers/src/utils/truncation.rs (`truncate_encodings`) and transformers/tokenization_python.py
(`truncate_sequences`), each with the strategy ``longest_first``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tpray.tokenizer import Encoded


@dataclass(frozen=True)
class Template:
    """The special tokens around one text, or around the two of a pair, and the token types.

    around: one row more than there are texts: before the first, after each. types: the token type of each text.
    """

    around: tuple[Encoded, ...]
    types: tuple[int, ...]

    @classmethod
    def of(cls, row: Encoded, parts: Sequence[Sequence[int]]) -> Template | None:
        """The template in which ``row`` holds ``parts``, the ids of its texts; None if it does not hold them."""
        around, types, start = [], [], 0
        for part in parts:
            places = range(start, len(row) - len(part) + 1)
            found = next((i for i in places if row.ids[i : i + len(part)] == list(part)), None)
            if found is None or not part:
                return None
            around.append(Encoded(row.ids[start:found], row.types[start:found]))
            types.append(row.types[found])
            start = found + len(part)
        return cls((*around, Encoded(row.ids[start:], row.types[start:])), tuple(types))

    @cached_property
    def added(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.around))

    def put(self, parts: Sequence[Sequence[int]]) -> Encoded:
        """The row that holds ``parts``."""
        ids, types = list(self.around[0].ids), list(self.around[0].types)
        for part, kind, after in zip(parts, self.types, self.around[1:], strict=True):
            ids += part
            ids += after.ids
            types += [kind] * len(part)
            types += after.types
        return Encoded(ids, types)


def kept(lengths: Sequence[int], room: int, compiled: bool) -> tuple[int, ...]:
    """How many tokens of each text of an item stay when ``room`` tokens are left for them.

    A length above ``room`` may be given as any number above it, if it is known which of the two is the greater.

    Args:
        lengths: the tokens of a text, or of each text of a pair.
        compiled: by the rule of the compiled tokenizers; else by that of transformers' own in Python. They differ where
            both texts are cut and ``room`` is odd: the longer one has the odd token (the second, if they are alike), or
            the first has it.
    """
    if sum(lengths) <= room:
        return tuple(lengths)
    if len(lengths) == 1:
        return (room,)
    first, second = lengths
    half = room // 2
    if min(first, second) > half:
        odd_first = first > second if compiled else True
        return (room - half, half) if odd_first else (half, room - half)
    return (first, room - first) if first <= second else (room - second, second)
