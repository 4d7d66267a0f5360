"""Items whose long texts are read in chunks: `chunks` says how, `codec` makes the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tpray.chat import Chat
from tpray.errors import InputError
from tpray.serving.chunks import Chunks, check_count
from tpray.serving.codec import Direction, TextCodec
from tpray.tokenizer import Encoded, Item, Tokens, check_text, texts_of


def encode_chunks(
    codec: TextCodec,
    items: Sequence[Item],
    chunks: Chunks,
    truncate: bool = False,
    direction: Direction | None = None,
    deadline: float = math.inf,
    max_rows: float = math.inf,
) -> list[list[Encoded]]:
    """The rows of each item: of a text, or the second text of a pair, in chunks.

    Args:
        truncate, direction, deadline: as for `TextCodec.encode`; what is cut is what the last chunk does not reach.

    Raises:
        As `TextCodec.encode_after`. InputError: an item is a conversation.
    """
    rows: list[list[Encoded]] = []
    for number, item in enumerate(items):
        if isinstance(item, (Chat, Tokens)):
            kind = "a conversation" if isinstance(item, Chat) else "made of token ids"
            raise InputError(f"is {kind}, and only texts are read in chunks: leave `chunks` out", number)
        for text in texts_of(item):
            check_text(text, number)
        *first, text = texts_of(item)
        try:
            rows += codec.encode_after(first, [text], codec.max_length, truncate, direction, deadline, chunks, max_rows)
        except InputError as e:
            raise type(e)(e.message, None if e.item is None else number) from e
        check_count(sum(map(len, rows)), max_rows)
    return rows
