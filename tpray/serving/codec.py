"""Before and after the group: text to token ids, logits to labelled scores.

Legend: L labels. An item is one text, or a pair of texts that the model reads together.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.config import DEMO_DIR
from tpray.errors import DeadlineError, EmptyInputError, InputError, InputTooLongError
from tpray.group.wire import Array
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.serving.joints import Joints
from tpray.serving.template import Template, kept
from tpray.serving.tokenizer_facts import TokenizerFacts
from tpray.tokenizer import (
    Encoded,
    Item,
    check_vocabulary,
    load_tokenizer,
    longest_row,
    sample_items,
    stock_rows,
)

Direction = Literal["Left", "Right"]


@dataclass(frozen=True, slots=True)
class Score:
    """One label of one item. score: a probability, or the raw logit where that was asked for."""

    label: str
    score: float


WHOLE_CHARS = 8192
"""A longer text is tokenised part by part, and no further than it matters. One that is not longer is tokenised whole,
so that its number of tokens is known."""

PART_CHARS = 1024
"""About how long the first part is; each is twice as long as the one before, up to `LARGE_CHARS`."""

LARGE_CHARS = 131_072
"""A longer part has no joint, and takes some 200 bytes a character for a while: tokenise one such text at a time."""


@dataclass(slots=True)
class _Reading:
    """The tokens of a text, read from one end as far as they matter.

    ids: what was read. unread: the tokens of its other parts, in their order from that end; None: there are none.
    """

    ids: list[int]
    unread: Iterator[list[int]] | None = None
    from_end: bool = False

    def read(self, beyond: int) -> None:
        """Read until there are more than ``beyond`` tokens, or all."""
        while self.unread is not None and len(self.ids) <= beyond:
            part = next(self.unread, None)
            if part is None:
                self.unread = None
            else:
                self.ids = part + self.ids if self.from_end else self.ids + part

    def cut(self, length: int) -> list[int]:
        """The ``length`` tokens at that end."""
        return self.ids[len(self.ids) - length :] if self.from_end else self.ids[:length]


class TextCodec:
    """Tokenises items exactly as transformers does, and names scores, for one model. Any thread may use it.

    The tokenizer's compiled half is called directly where it gives what transformers gives, and transformers itself
    where it does not: for tokenizers in Python, and for settings that live in transformers' own half. Either gives the
    tokens of single texts, without special ones. Here they are cut and the special ones added, in time linear in what
    is kept. (The compiled half keeps what it cuts off, for a pair in all combinations.)

    Args:
        directory: ``config.json`` and the tokenizer's files.
        record: the model's labels, problem type and sizes.
        facts: what another codec of the same files has learned; transformers is then not imported.

    Raises:
        CheckpointError: there is no tokenizer in ``directory`` that can be the model's.
    """

    def __init__(self, directory: Path, record: ModelRecord, facts: TokenizerFacts | None = None) -> None:
        self.record, self._directory = record, directory
        self.pad_id = record.pad_id
        self._lock = threading.Lock()  # transformers keeps how to cut as the tokenizer's state
        self.facts = facts or self._learn()
        self.max_length, self._own_side = self.facts.max_length, self.facts.side
        self._templates: tuple[Template, ...] = self.facts.templates
        self._compiled: Any = self.facts.tokenizer()
        self.compiled = self._compiled is not None
        """Whether the compiled half gives what transformers gives."""
        self._joints = self._find_joints()

    @cached_property
    def _stock(self) -> Any:
        """transformers' tokenizer."""
        tokenizer = load_tokenizer(self._directory, self.record.source)
        check_vocabulary(tokenizer, self.record.vocab_size, self.record.source)
        return tokenizer

    def _learn(self) -> TokenizerFacts:
        samples = sample_items(self._stock)
        expected = self._stock_rows(samples, None)
        for compiled in (self._compile(), None):
            self._compiled = compiled
            self._templates = self._learn_templates(samples, expected)
            if self._templates and [self._sample_row(item) for item in samples] == expected:
                break
        else:
            self._templates = ()  # its rows are not its texts' tokens in a template: transformers makes them whole
        added = list(self._stock.added_tokens_decoder.values())
        return TokenizerFacts(
            max_length=longest_row(self._stock, self.record.max_length),
            side="Left" if self._stock.truncation_side == "left" else "Right",
            fast=self._stock.is_fast,
            special_split=self._compiled is not None and self._compiled.encode_special_tokens,
            added=tuple(token.content for token in added),
            greedy=any(token.rstrip or token.single_word for token in added),
            templates=self._templates,
            compiled=None if self._compiled is None else self._compiled.to_str(),
        )

    def _compile(self) -> Any:
        from tokenizers import Tokenizer

        if not self._stock.is_fast:
            return None
        try:
            compiled = Tokenizer.from_str(self._stock.backend_tokenizer.to_str())
        except Exception:  # noqa: BLE001  # tokenizers raises no other class; it has a part in Python, as RoFormer's
            return None
        compiled.encode_special_tokens = self._stock.split_special_tokens
        compiled.no_padding()
        compiled.no_truncation()
        return compiled

    def _learn_templates(self, samples: Sequence[Item], rows: Sequence[Encoded]) -> tuple[Template, ...]:
        """The templates of a text and of a pair, from the first sample of each; () if they have none."""
        templates = []
        for count in (1, 2):
            item, row = next(
                (item, row) for item, row in zip(samples, rows, strict=True) if len(_texts_of(item)) == count
            )
            template = Template.of(row, self._tokens(_texts_of(item)))
            if template is None:
                return ()
            templates.append(template)
        return tuple(templates)

    def _sample_row(self, item: Item) -> Encoded:
        parts = self._tokens(_texts_of(item))
        return self._templates[len(parts) - 1].put(parts)

    def _find_joints(self) -> Joints:
        words_of: Callable[[str], list[str]] | None = None
        if self._compiled is not None:
            normalizer, splitter = self._compiled.normalizer, self._compiled.pre_tokenizer

            def words_of(text: str) -> list[str]:
                plain = text if normalizer is None else normalizer.normalize_str(text)
                return [plain] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(plain)]

        return Joints(self._tokens, words_of, self.facts.added, self.facts.greedy)

    def encode(
        self,
        items: Sequence[Item],
        truncate: bool = False,
        direction: Direction | None = None,
        deadline: float = math.inf,
    ) -> list[Encoded]:
        """Tokenise ``items``, special tokens added.

        Args:
            truncate: cut items that are longer than the model takes.
            direction: the end that is cut; None: the one that the tokenizer's ``truncation_side`` names.
            deadline: give up then; `time.monotonic` seconds.

        Raises:
            EmptyInputError, InputError: an item without text, with characters no text has, or with tokens that the
                model does not know.
            InputTooLongError: an item is too long and ``truncate`` is false.
            DeadlineError: ``deadline`` passed.
        """
        for number, item in enumerate(items):
            for text in _texts_of(item):
                _check_text(text, number)
        way = (direction or self._own_side) if truncate else None
        rows = self._rows(items, way, deadline) if self._templates else self._stock_rows(items, way)
        for number, row in enumerate(rows):
            self._check_row(row, number)
        return rows

    def _stock_rows(self, items: Sequence[Item], way: Direction | None) -> list[Encoded]:
        with self._lock:
            return stock_rows(self._stock, items, None if way is None else self.max_length, (way or "Right").lower())

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens."""
        if self._compiled is not None:
            return [made.ids for made in self._compiled.encode_batch_fast(list(texts), add_special_tokens=False)]
        with self._lock:
            made = [self._stock(text, add_special_tokens=False, verbose=False) for text in texts]
        return [list(row["input_ids"]) for row in made]

    def _rows(self, items: Sequence[Item], way: Direction | None, deadline: float) -> list[Encoded]:
        short = iter(self._tokens([text for item in items for text in _texts_of(item) if len(text) <= WHOLE_CHARS]))
        left = way == "Left"

        def row(item: Item, number: int) -> Encoded:
            texts = _texts_of(item)
            if all(len(text) <= WHOLE_CHARS for text in texts):
                parts, template = [next(short) for _ in texts], self._templates[len(texts) - 1]
                if sum(map(len, parts)) + template.added <= self.max_length:
                    return template.put(parts)
                return self._row([_Reading(part, from_end=left) for part in parts], way, number)
            return self._row([reading(text) for text in texts], way, number)

        def reading(text: str) -> _Reading:
            if len(text) <= WHOLE_CHARS:
                return _Reading(next(short), from_end=left)
            return _Reading([], self._parts(text, left, deadline), left)

        return [row(item, number) for number, item in enumerate(items)]

    def _parts(self, text: str, from_end: bool, deadline: float) -> Iterator[list[int]]:
        """The tokens of the parts of a long text, each made when it is asked for."""
        for part in self._joints.parts(text, PART_CHARS, LARGE_CHARS // 2, from_end):
            if time.monotonic() > deadline:
                raise DeadlineError("the request's time ran out while its text was tokenised: send less text")
            yield from self._tokens([part])

    def _row(self, texts: list[_Reading], way: Direction | None, number: int) -> Encoded:
        template = self._templates[len(texts) - 1]
        room = max(0, self.max_length - template.added)
        for text in texts:
            text.read(self.max_length)
        lengths = [len(text.ids) for text in texts]
        if sum(lengths) > room:
            if way is None:
                raise self._too_long(sum(lengths) + template.added, all(text.unread is None for text in texts), number)
            if len(texts) == 2 and room % 2 and min(lengths) > room // 2:
                beyond = self.max_length  # one token hangs on which is the longer one
                while all(text.unread is not None for text in texts):
                    beyond *= 2
                    for text in texts:
                        text.read(beyond)
                ended = max(len(text.ids) for text in texts if text.unread is None)
                for text in texts:
                    text.read(ended)
                lengths = [len(text.ids) for text in texts]
        counts = kept(lengths, room, self.compiled or self.facts.fast)
        return template.put([text.cut(count) for text, count in zip(texts, counts, strict=True)])

    def _too_long(self, tokens: int, known: bool, number: int) -> InputTooLongError:
        said = str(tokens) if known else f"more than {self.max_length}"
        return InputTooLongError(
            f"has {said} tokens and this model takes {self.max_length}: shorten it, or set `truncate` to true", number
        )

    def _check_row(self, row: Encoded, number: int) -> None:
        """Refuse what the model cannot look up: it would fail the step, and all rows in it."""
        if not row.ids:
            raise EmptyInputError("has no tokens: send some text", number)
        if len(row) > self.max_length:
            raise self._too_long(len(row), True, number)
        if max(row.ids) >= self.record.vocab_size or min(row.ids) < 0:
            unknown = next(i for i in row.ids if not 0 <= i < self.record.vocab_size)
            made = self._compiled.id_to_token if self._compiled is not None else self._stock.convert_ids_to_tokens
            token = made(unknown)
            raise InputError(
                f"has the token {token!r} with the id {unknown}, and the model's vocabulary ends at "
                f"{self.record.vocab_size - 1}: leave it out, or resize the model's embedding for its tokenizer",
                number,
            )
        types = self.record.token_types
        if types and max(row.types) >= types:
            raise InputError(f"has the token type {max(row.types)}, and the model has {types}", number)

    def scores(self, logits: Array, raw: bool = False) -> list[list[Score]]:
        """Every label of each item, best first.

        Args:
            logits: float32 ``[B, L]``, finite.
            raw: give the logits themselves.

        The activation follows transformers' text-classification pipeline: sigmoid for multi-label models
        and for a single label, softmax for one of several, none for regression.
        """
        values = logits.astype(np.float64)
        if not raw:
            values = self._activate(values)
        order = np.argsort(-values, axis=1, kind="stable")
        ranked, labels = np.take_along_axis(values, order, axis=1).tolist(), self.record.labels
        return [
            [Score(labels[i], score) for i, score in zip(row, scores, strict=True)]
            for row, scores in zip(order.tolist(), ranked, strict=True)
        ]

    def _activate(self, values: Array) -> Array:
        kind = self.record.problem_type
        if kind == "regression":
            return values
        if kind == "multi_label_classification" or values.shape[1] == 1:
            # exp of a negative number only, so that no logit overflows
            small = np.exp(-np.abs(values))
            return np.where(values >= 0, 1.0, small) / (1.0 + small)
        exponents = np.exp(values - values.max(axis=1, keepdims=True))
        result: Array = exponents / exponents.sum(axis=1, keepdims=True)
        return result


def lengths_of(model: str | None, items: Sequence[Item]) -> list[int]:
    """How many tokens each item has for ``model`` (None: the demo), special ones included.

    Raises:
        ModelNotFoundError, CheckpointError: there is no such model, or it has no tokenizer.
    """
    checkpoint = find_checkpoint(model or DEMO_DIR)
    limit = checkpoint.plan.max_length(checkpoint.config)
    rows = stock_rows(load_tokenizer(checkpoint.directory, checkpoint.source), items)
    return [min(len(row), limit) for row in rows]


def _texts_of(item: Item) -> tuple[str, ...]:
    return (item,) if isinstance(item, str) else item


def _check_text(text: str, number: int) -> None:
    if not text or text.isspace():
        raise EmptyInputError("is empty: send some text", number)
    position = text.find("\0")
    if position >= 0:
        raise InputError(f"has a NUL character at position {position}: remove it", number)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"has half of a surrogate pair, or a byte that is not UTF-8, at position {e.start}: send valid Unicode",
            number,
        ) from e
