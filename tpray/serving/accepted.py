"""What a model takes, for those that ask before they send: ``inputs`` in ``/info``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tpray.errors import TprayError
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.codec import TextCodec
from tpray.serving.relevance import Relevance

Kind = Literal["text", "pair", "conversation", "query", "tokens"]


def accepted_inputs(codec: TextCodec, directory: Path) -> list[Kind]:
    """Which kinds of input the model takes.

    Args:
        directory: its files.

    Returns:
        ``tokens`` of a model that labels these. Of others ``text`` and ``pair``; ``conversation``, if there is a chat
        template; and ``query``, with documents, if the model can rank these.
    """
    if codec.record.task == TOKEN:
        return ["tokens"]
    kinds: list[Kind] = ["text", "pair"]
    if codec.takes_conversations:
        kinds.append("conversation")
    try:
        Relevance.of(directory, codec)
    except TprayError:
        return kinds
    return [*kinds, "query"]
