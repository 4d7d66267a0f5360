"""Labels for the tokens of texts: what the engine answers where the model is a classifier of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpray.errors import EmptyInputError, InputError, PayloadTooLargeError, UnsupportedTaskError
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.answers import Tagged
from tpray.serving.codec import Direction
from tpray.serving.entities import OF_WORDS, STRATEGIES, Strategy, entities
from tpray.serving.rows import RowResult
from tpray.serving.token_codec import Token, TokenCodec, check_task
from tpray.tokenizer import Encoded

if TYPE_CHECKING:
    from tpray.serving.engine import Engine


@dataclass(frozen=True)
class Tagging:
    """How tokens are to be labelled.

    strategy: transformers' ``aggregation_strategy``; see `Strategy`. ignore_labels: entities of these are left out.
    raw_scores: each token's logits too, in the order of the labels. truncate, direction: as for `TextCodec.encode`.
    """

    strategy: Strategy = "none"
    ignore_labels: Sequence[str] = ("O",)
    raw_scores: bool = False
    truncate: bool = False
    direction: Direction | None = None

    def check(self, codec: TokenCodec) -> None:
        """Refuse what this model's tokens cannot be asked.

        Raises:
            InputError: there is no such strategy, or none that goes with logits.
            UnsupportedTaskError: the tokenizer does not say where words are.
        """
        if self.strategy not in STRATEGIES:
            raise InputError(f"aggregation_strategy is {self.strategy!r}: there are {', '.join(STRATEGIES)}")
        if self.raw_scores and self.strategy != "none":
            raise InputError(f"raw_scores are each token's, and aggregation_strategy is {self.strategy}: ask for none")
        if self.strategy in OF_WORDS and not codec.knows_words:
            raise UnsupportedTaskError(
                f"the tokenizer of {codec.record.source} does not say where words are, which aggregation_strategy "
                f"{self.strategy} asks for: take none or simple"
            )

    def entities(self, codec: TokenCodec, tokens: Sequence[Token], result: RowResult) -> list[dict[str, Any]]:
        """The entities of one text."""
        places = slice(tokens[0].index, tokens[-1].index + 1) if tokens else slice(0)
        logits, ignored = result.logits[places], set(self.ignore_labels)
        found = entities(tokens, logits, codec.record.labels, self.strategy, codec.join)
        if self.raw_scores:
            found = [each | {"logits": own} for each, own in zip(found, logits.tolist(), strict=True)]
        return [each for each in found if each.get("entity", each.get("entity_group")) not in ignored]


async def tag(engine: Engine, texts: Sequence[str], how: Tagging, deadline: float | None = None) -> Tagged:
    """Label the tokens of each text.

    Raises:
        UnsupportedTaskError: the model labels texts and not their tokens.
        As `Engine.classify`.
    """
    codec, most = engine.codec, engine.config.max_client_batch_size
    check_task(codec.record, TOKEN)
    assert isinstance(codec, TokenCodec), "made for the task"
    how.check(codec)
    if not texts:
        raise EmptyInputError("there is nothing to label: send at least one text")
    if len(texts) > most:
        raise PayloadTooLargeError(f"there are {len(texts)} texts and the limit is {most}: send smaller batches")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError("is no text: tokens are labelled in single texts", number)
    tokens: list[list[Token]] = []

    def rows(until: float) -> list[Encoded]:
        made = codec.encode(texts, how.truncate, how.direction, until)
        tokens.extend(codec.tokens_of(*each, how.direction, i) for i, each in enumerate(zip(texts, made, strict=True)))
        return made

    results, timing = await engine.answer(len(texts), rows, sum(map(len, texts)), deadline)

    def found() -> list[list[dict[str, Any]]]:
        return [how.entities(codec, *each) for each in zip(tokens, results, strict=True)]

    return Tagged(**timing, entities=await asyncio.to_thread(found))
