"""Before and after the group: text to token ids, logits to labelled scores.

Legend: L labels. An item is one text, or a pair of texts that the model reads together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.config import DEMO_DIR
from tpray.errors import EmptyInputError, InputError, InputTooLongError
from tpray.group.wire import Array
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.tokenizer import (
    Encoded,
    Item,
    check_vocabulary,
    load_tokenizer,
    longest_row,
    sample_items,
    stock_rows,
    takes_types,
)

Direction = Literal["Left", "Right"]


@dataclass(frozen=True, slots=True)
class Score:
    """One label of one item. score: a probability, or the raw logit where that was asked for."""

    label: str
    score: float


class TextCodec:
    """Tokenises items exactly as transformers does, and names scores, for one model. Any thread may use it.

    The tokenizer's compiled half is called directly where it gives what transformers gives, and transformers itself
    where it does not: for tokenizers in Python, and for settings that live in transformers' own half.

    Args:
        directory: ``config.json`` and the tokenizer's files.
        record: the model's labels, problem type and sizes.

    Raises:
        CheckpointError: there is no tokenizer in ``directory`` that can be the model's.
    """

    def __init__(self, directory: Path, record: ModelRecord) -> None:
        self.record = record
        self._stock = load_tokenizer(directory, record.source)
        check_vocabulary(self._stock, record.vocab_size, record.source)
        self.pad_id = record.pad_id
        self.max_length = longest_row(self._stock, record.max_length)
        self._lock = threading.Lock()  # transformers keeps how to cut as the tokenizer's state
        self._typed = takes_types(self._stock)
        self._own_side: Direction = "Left" if self._stock.truncation_side == "left" else "Right"
        # Truncation is a state of the compiled half too, so there is one of them for each way to cut.
        ways: dict[Direction | None, str] = {None: "right", "Left": "left", "Right": "right"}
        self._compiled = {way: self._compile(side, way is not None) for way, side in ways.items()}
        samples = sample_items(self._stock)
        self.compiled = self._compiled[None] is not None and all(
            self._encode_compiled(samples, way) == self._encode_stock(samples, way) for way in ways
        )
        """Whether the compiled half gives what transformers gives."""

    def _compile(self, side: str, cut: bool) -> Any:
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
        if cut:
            compiled.enable_truncation(self.max_length, direction=side)
        return compiled

    def encode(
        self, items: Sequence[Item], truncate: bool = False, direction: Direction | None = None
    ) -> list[Encoded]:
        """Tokenise ``items``, special tokens added.

        Args:
            truncate: cut items that are longer than the model takes.
            direction: the end that is cut; None: the one that the tokenizer's ``truncation_side`` names.

        Raises:
            EmptyInputError, InputError: an item without text, with characters no text has, or with tokens that the
                model does not know.
            InputTooLongError: an item is too long and ``truncate`` is false.
        """
        for number, item in enumerate(items):
            for text in (item,) if isinstance(item, str) else item:
                _check_text(text, number)
        way = (direction or self._own_side) if truncate else None
        rows = self._encode_compiled(items, way) if self.compiled else self._encode_stock(items, way)
        for number, row in enumerate(rows):
            self._check_row(row, number)
        return rows

    def _encode_compiled(self, items: Sequence[Item], way: Direction | None) -> list[Encoded]:
        made = self._compiled[way].encode_batch(list(items))
        return [Encoded(e.ids, e.type_ids if self._typed else [0] * len(e.ids)) for e in made]

    def _encode_stock(self, items: Sequence[Item], way: Direction | None) -> list[Encoded]:
        with self._lock:
            return stock_rows(self._stock, items, None if way is None else self.max_length, (way or "Right").lower())

    def _check_row(self, row: Encoded, number: int) -> None:
        """Refuse what the model cannot look up: it would fail the step, and all rows in it."""
        if not row.ids:
            raise EmptyInputError("has no tokens: send some text", number)
        if len(row) > self.max_length:
            raise InputTooLongError(
                f"has {len(row)} tokens and this model takes {self.max_length}: shorten it, or set `truncate` to true",
                number,
            )
        if max(row.ids) >= self.record.vocab_size or min(row.ids) < 0:
            unknown = next(i for i in row.ids if not 0 <= i < self.record.vocab_size)
            token = self._stock.convert_ids_to_tokens(unknown)
            raise InputError(
                f"has the token {token!r} with the id {unknown}, and the model's vocabulary ends at "
                f"{self.record.vocab_size - 1}: leave it out, or resize the model's embedding for its tokenizer",
                number,
            )
        types = self.record.token_types
        if types and max(row.types) >= types:
            raise InputError(f"has the token type {max(row.types)}, and the model has {types}", number)

    def scores(self, logits: Array, raw: bool = False) -> list[Score]:
        """Every label of one item, best first.

        Args:
            logits: float32 ``[L]``.
            raw: give the logits themselves.

        The activation follows transformers' text-classification pipeline: sigmoid for multi-label models
        and for a single label, softmax for one of several, none for regression.
        """
        values = logits.astype(np.float64)
        if not raw:
            values = self._activate(values)
        order = np.argsort(-values, kind="stable")
        return [Score(self.record.labels[i], float(values[i])) for i in order]

    def _activate(self, values: Array) -> Array:
        kind = self.record.problem_type
        if kind == "regression":
            return values
        if kind == "multi_label_classification" or len(values) == 1:
            # exp of a negative number only, so that no logit overflows
            small = np.exp(-np.abs(values))
            return np.where(values >= 0, 1.0, small) / (1.0 + small)
        exponents = np.exp(values - values.max())
        result: Array = exponents / exponents.sum()
        return result


def lengths_of(model: str | None, items: Sequence[Item]) -> list[int]:
    """How many tokens each item has for ``model`` (None: the demo), special ones included.

    Raises:
        ModelNotFoundError, CheckpointError: there is no such model, or it has no tokenizer.
    """
    checkpoint = find_checkpoint(model or DEMO_DIR)
    limit = checkpoint.plan.max_length(checkpoint.config)
    return [len(row) for row in stock_rows(load_tokenizer(checkpoint.directory, checkpoint.source), items, limit)]


def _check_text(text: str, number: int) -> None:
    if not text or text.isspace():
        raise EmptyInputError("is empty: send some text", number)
    position = text.find("\0")
    if position >= 0:
        raise InputError(f"has a NUL character at position {position}: remove it", number)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"has half of a surrogate pair at position {e.start}: send valid Unicode", number) from e
