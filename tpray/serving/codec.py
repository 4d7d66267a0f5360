"""Before and after the group: text to token ids, logits to labelled scores.

Legend: L labels. An item is one text, or a pair of texts that the model reads together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.config import DEMO_DIR
from tpray.errors import CheckpointError, EmptyInputError, InputError, InputTooLongError
from tpray.group.wire import Array
from tpray.parallel_layers.checkpoint import find_checkpoint

Item = str | tuple[str, str]
Direction = Literal["Left", "Right"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row before padding: token ids and token types, both of its length in tokens."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Score:
    """One label of one item. score: a probability, or the raw logit where that was asked for."""

    label: str
    score: float


class TextCodec:
    """Tokenises items and names scores, for one model.

    Args:
        directory: ``config.json`` and the tokenizer's files.
        record: the model's labels, problem type and longest row.

    Raises:
        CheckpointError: there is no tokenizer in ``directory``, or not one of the fast kind.
    """

    def __init__(self, directory: Path, record: ModelRecord) -> None:
        from tokenizers import Tokenizer

        tokenizer = _load_tokenizer(directory, record.source)
        self.record = record
        self.pad_id: int = tokenizer.pad_token_id or 0
        self.max_length = min(record.max_length, tokenizer.model_max_length)
        stored = tokenizer.backend_tokenizer.to_str()
        # Truncation is a state of the tokenizer, so there is one of them for each way to truncate.
        self._whole = Tokenizer.from_str(stored)
        self._whole.no_truncation()
        self._whole.no_padding()
        self._cut: dict[str, Tokenizer] = {}
        for direction in ("left", "right"):
            cut = Tokenizer.from_str(stored)
            cut.no_padding()
            cut.enable_truncation(self.max_length, direction=direction)
            self._cut[direction.capitalize()] = cut

    def encode(self, items: Sequence[Item], truncate: bool = False, direction: Direction = "Right") -> list[Encoded]:
        """Tokenise ``items``, special tokens added.

        Args:
            truncate: cut items that are longer than the model takes, from the end that ``direction`` names.

        Raises:
            EmptyInputError, InputError: an item without text, or with characters no text has.
            InputTooLongError: an item is too long and ``truncate`` is false.
        """
        for number, item in enumerate(items):
            for text in (item,) if isinstance(item, str) else item:
                _check_text(text, number)
        tokenizer = self._cut[direction] if truncate else self._whole
        rows = [Encoded(e.ids, e.type_ids) for e in tokenizer.encode_batch(list(items))]
        for number, row in enumerate(rows):
            if len(row) > self.max_length:
                raise InputTooLongError(
                    f"has {len(row)} tokens and this model takes {self.max_length}: shorten it, or set `truncate` to "
                    "true",
                    number,
                )
        return rows

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


def _load_tokenizer(directory: Path, source: str) -> Any:
    """transformers' fast tokenizer in ``directory``, which belongs to the model that the user calls ``source``."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as e:
        raise CheckpointError(
            f"{source} has no tokenizer that transformers can load ({str(e).splitlines()[0]}): put its tokenizer.json "
            "beside config.json"
        ) from e
    if not tokenizer.is_fast:
        raise CheckpointError(f"{source}: its tokenizer has no fast version (a tokenizer.json)")
    return tokenizer


def lengths_of(model: str | None, items: Sequence[Item]) -> list[int]:
    """How many tokens each item has for ``model`` (None: the demo), special ones included.

    Raises:
        ModelNotFoundError, CheckpointError: there is no such model, or it has no fast tokenizer.
    """
    checkpoint = find_checkpoint(model or DEMO_DIR)
    limit = checkpoint.plan.max_length(checkpoint.config)
    tokenizer = _load_tokenizer(checkpoint.directory, checkpoint.source).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return [len(e.ids) for e in tokenizer.encode_batch(list(items))]


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
