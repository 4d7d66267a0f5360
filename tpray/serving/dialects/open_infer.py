"""What the Open Inference Protocol asks of a classifier, over HTTP and over gRPC alike: tensors in, tensors out.

Inputs are texts (``text``, and ``text_pair``), or rows of tokens (``input_ids``, ``attention_mask``,
``token_type_ids``). Outputs are ``logits``, and ``probabilities``: what the model's problem type makes of them. Of a
classifier of tokens they are each token's, and texts are not taken: nobody would know which token is which.

Legend: n rows of a request, s tokens of a row, L labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.config import BatchConfig
from tpray.errors import (
    EmptyInputError,
    InputError,
    InputTooLongError,
    PayloadTooLargeError,
    UnknownModelError,
    UnsupportedTaskError,
)
from tpray.group.wire import Array
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.answers import Timing
from tpray.serving.codec import Direction
from tpray.serving.dialects.open_tensors import Tensor
from tpray.serving.engine import Engine
from tpray.serving.model_names import ModelNames
from tpray.serving.scores import activated
from tpray.serving.tokenizer_threads import INLINE_CHARS
from tpray.tokenizer import Encoded, Item

VERSION = "1"
"""Of every model; the protocol wants one."""

EXTENSIONS = ("binary_tensor_data", "classification")

TEXTS, TOKENS = ("text", "text_pair"), ("input_ids", "attention_mask", "token_type_ids")
LOGITS, PROBABILITIES = "logits", "probabilities"
OUTPUTS = (LOGITS, PROBABILITIES)
PARAMETERS = ("truncation", "timeout")

ITEMS, TO_CUT = "inputs", "the parameter `truncation` to true"
"""What errors call the rows, and what would have them cut; see `tpray.serving.dialects.tei.sentence_of`."""

_SIDES: dict[Any, tuple[bool, Direction | None]] = {
    False: (False, None),
    True: (True, None),
    "left": (True, "Left"),
    "right": (True, "Right"),
}


@dataclass(frozen=True)
class Wanted:
    """An output that is asked for. classes: so many labels in place of numbers, the best first; 0: numbers."""

    name: str
    classes: int = 0


@dataclass(frozen=True)
class Output:
    """One output: float32 ``[n, L]`` or ``[n, s, L]``, or texts ``[n, classes]``, row by row."""

    name: str
    shape: tuple[int, ...]
    values: Array | list[str]

    @property
    def datatype(self) -> str:
        """The protocol's name of it."""
        return "FP32" if isinstance(self.values, np.ndarray) else "BYTES"


@dataclass(frozen=True)
class Inferred(Timing):
    """What became of one request: its outputs, in the order in which they were asked for."""

    outputs: list[Output]


def inputs_of(record: ModelRecord) -> list[tuple[str, str, list[int]]]:
    """Name, datatype and shape of what the model takes, for its metadata."""
    texts = [] if record.task == TOKEN else [(name, "BYTES", [-1]) for name in TEXTS]
    return texts + [(name, "INT64", [-1, -1]) for name in TOKENS]


def outputs_of(record: ModelRecord) -> list[tuple[str, str, list[int]]]:
    """The same of what it gives."""
    shape = [-1, -1, len(record.labels)] if record.task == TOKEN else [-1, len(record.labels)]
    return [(name, "FP32", shape) for name in OUTPUTS]


def check_model(names: ModelNames, name: str, version: str) -> None:
    """Refuse another model, or a version that it does not have; "" is any.

    Raises:
        UnknownModelError: in these words.
    """
    names.check(name)
    if version not in ("", VERSION):
        raise UnknownModelError(f"the model `{name}` has no version {version!r} here: there is {VERSION}")


async def infer(
    engine: Engine,
    tensors: Sequence[Tensor],
    wanted: Sequence[Wanted],
    parameters: Mapping[str, Any],
    deadline: float,
    worth: Callable[[], None] = lambda: None,
) -> Inferred:
    """Answer one request.

    Args:
        wanted: none: all outputs.
        parameters: ``truncation``: whether, or at which side, texts that are too long are cut, else as the server's
            ``auto_truncate`` says; ``timeout``: how long the client will wait, microseconds, as in Triton.
        deadline, worth: as for `tpray.serving.dialects.base.Respond`.

    Raises:
        InputError: with the name of what is wrong.
        As `Engine.classify`.
    """
    record = engine.codec.record
    truncate, direction, deadline = _read(parameters, engine.config, deadline)
    for each in wanted:
        _check_wanted(each, record)
    given = _by_name(tensors)
    rows = len(next(iter(given.values())).values)
    if any(len(tensor.values) != rows for tensor in given.values()):
        shown = ", ".join(f"`{name}` has {len(tensor.values)}" for name, tensor in given.items())
        raise InputError(f"the inputs have different numbers of rows: {shown}")
    if not rows:
        raise EmptyInputError("the inputs have no rows: send at least one")
    if rows > engine.config.max_client_batch_size:
        raise PayloadTooLargeError(
            f"the inputs have {rows} rows and the limit is {engine.config.max_client_batch_size}: send smaller batches"
        )
    if "input_ids" in given:
        encoded = rows_of_tokens(given, record, engine.codec.max_length)
        length = np.shape(given["input_ids"].values)[1]
        worth()
        results, timing = await engine.answer(rows, lambda _: encoded, None, deadline)
    else:
        if record.task == TOKEN:
            raise UnsupportedTaskError(
                f"{record.source} labels the tokens of texts: send input_ids in place of text, or ask for "
                "/token_classification"
            )
        items, length = _items(given), 0
        characters = sum(map(len, (text for tensor in given.values() for text in tensor.values)))
        inline = characters <= INLINE_CHARS and engine.codec.compiled
        worth()
        results, timing = await engine.answer(
            rows,
            lambda until: engine.codec.encode(items, truncate, direction, until),
            None if inline else characters,
            deadline,
        )
    logits = [result.logits for result in results]
    if record.task == TOKEN:
        logits = [logit[: len(row)] for logit, row in zip(logits, encoded, strict=True)]
    return Inferred(**timing, outputs=[_output(each, logits, record, length) for each in wanted or _ALL])


_ALL = tuple(map(Wanted, OUTPUTS))


def _read(parameters: Mapping[str, Any], limits: BatchConfig, deadline: float) -> tuple[bool, Direction | None, float]:
    for name in parameters:
        if name not in PARAMETERS:
            raise InputError(f"the parameter `{name}` is not known here: leave it out; there are {_list(PARAMETERS)}")
    parameters = {name: value for name, value in parameters.items() if value is not None}
    timeout_us = parameters.get("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise InputError(f"the parameter `timeout` is {timeout_us!r}: send whole microseconds")
    if timeout_us:  # Triton's 0 is none
        deadline = min(deadline, time.monotonic() + timeout_us / 1e6)
    said = parameters.get("truncation", limits.auto_truncate)
    if isinstance(said, (bool, str)) and said in _SIDES:
        return *_SIDES[said], deadline
    raise InputError(f"the parameter `truncation` is {said!r}: send true, false, left or right")


def _check_wanted(wanted: Wanted, record: ModelRecord) -> None:
    if wanted.name not in OUTPUTS:
        raise InputError(f"there is no output `{wanted.name}`: there are {_list(OUTPUTS)}")
    if wanted.classes < 0:
        raise InputError(f"output `{wanted.name}`: classification is {wanted.classes}: ask for 1 label or more")
    if wanted.classes and record.task == TOKEN:
        raise UnsupportedTaskError(
            f"{record.source} labels tokens, which the classification extension has no place for: ask for numbers"
        )


def _by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs by name, the one that is needed first."""
    given: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name not in (*TEXTS, *TOKENS):
            raise InputError(f"there is no input `{tensor.name}`: there are {_list((*TEXTS, *TOKENS))}")
        if tensor.name in given:
            raise InputError(f"the input `{tensor.name}` is there twice: send it once")
        given[tensor.name] = tensor
        if (tensor.name in TEXTS) != isinstance(tensor.values, list):
            needed = "BYTES" if tensor.name in TEXTS else "INT64 or INT32"
            raise InputError(f"the input `{tensor.name}` has another datatype: send {needed}")
    if not given:
        raise EmptyInputError("there are no inputs: send text, or input_ids")
    for kind in (TEXTS, TOKENS):
        if given.keys() & set(kind):
            if kind[0] not in given:
                raise InputError(f"the input `{next(iter(given))}` goes with `{kind[0]}`: send that too")
            if given.keys() - set(kind):
                raise InputError("there are texts and tokens: send either text or input_ids")
    return given


def _items(given: Mapping[str, Tensor]) -> list[Item]:
    texts = given["text"].values
    assert isinstance(texts, list), "looked at"
    if "text_pair" not in given:
        return list(texts)
    return list(zip(texts, given["text_pair"].values, strict=True))


def rows_of_tokens(given: Mapping[str, Tensor], record: ModelRecord, max_length: int) -> list[Encoded]:
    """The rows of ``input_ids``, each without its padding.

    Raises:
        InputError, InputTooLongError: tensors of different shapes, padding that is not at the end, or tokens that the
            model does not know.
    """
    ids: Array = np.asarray(given["input_ids"].values)
    for name, tensor in given.items():
        if np.shape(tensor.values) != ids.shape:
            shape = list(np.shape(tensor.values))
            raise InputError(f"the input `{name}` has the shape {shape} and `input_ids` {list(ids.shape)}: send one")
    mask = np.asarray(given["attention_mask"].values) if "attention_mask" in given else np.ones_like(ids)
    types = np.asarray(given["token_type_ids"].values) if "token_type_ids" in given else np.zeros_like(ids)
    lengths = mask.sum(axis=1)
    wrong = np.flatnonzero((mask != (np.arange(ids.shape[1]) < lengths[:, None])).any(axis=1))
    if len(wrong):
        raise InputError("has an `attention_mask` that is not ones and then zeros: pad at the end", int(wrong[0]))
    known, rows = {"token id": record.vocab_size, "token type": max(1, record.token_types)}, []
    for number, length in enumerate(lengths.tolist()):
        if not length:
            raise EmptyInputError("has no tokens: send one or more", number)
        if length > max_length:
            raise InputTooLongError(f"has {length} tokens and this model takes {max_length}: send fewer", number)
        row = Encoded(ids[number, :length].tolist(), types[number, :length].tolist())
        for (what, limit), values in zip(known.items(), (row.ids, row.types), strict=True):
            unknown = next((value for value in values if not 0 <= value < limit), None)
            if unknown is not None:
                raise InputError(f"has the {what} {unknown}, and this model knows 0 to {limit - 1}", number)
        rows.append(row)
    return rows


def _output(wanted: Wanted, logits: Sequence[Array], record: ModelRecord, length: int) -> Output:
    values: Array
    if record.task == TOKEN:  # zeros where a row has padding
        values = np.zeros((len(logits), length, len(record.labels)), dtype=np.float32)
        for place, row in zip(values, logits, strict=True):
            place[: len(row)] = row if wanted.name == LOGITS else activated(row, record)
        return Output(wanted.name, values.shape, values)
    values = np.stack(logits)
    values = (values if wanted.name == LOGITS else activated(values, record)).astype(np.float32)
    if not wanted.classes:
        return Output(wanted.name, values.shape, values)
    best = np.argsort(-values, axis=1, kind="stable")[:, : wanted.classes]
    named = [
        f"{values[row, label]}:{label}:{record.labels[label]}"
        for row, labels in enumerate(best.tolist())
        for label in labels
    ]
    return Output(wanted.name, best.shape, named)


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
