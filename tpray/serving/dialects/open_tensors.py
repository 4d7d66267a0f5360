"""Tensors of the Open Inference Protocol: what a request's numbers, strings or bytes are, and back.

Source: https://github.com/kserve/open-inference-protocol (tensor data in JSON, row by row or flat; raw contents), and
Triton's extension for binary tensor data, where an element of BYTES has its length before it, 4 bytes, little-endian.

Legend: n rows of a request, s tokens of a row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tpray.errors import InputError
from tpray.group.wire import Array

INTEGERS: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}
"""The datatypes that token ids may have."""

MOST = 1 << 31
"""A tensor of more elements is not looked at."""


@dataclass(frozen=True)
class Tensor:
    """What a request gives under a name. values: str ``[n]``, or int64 ``[n, s]``."""

    name: str
    values: list[str] | Array


def from_elements(name: str, datatype: str, shape: Sequence[int], data: Any) -> Tensor:
    """The tensor of elements in a list, or in lists of them, as JSON and the typed contents of gRPC have them.

    Raises:
        InputError: they do not go with the datatype or the shape.
    """
    count = _count(name, shape)
    flat = list(_flat(data)) if isinstance(data, (list, tuple)) else [data]
    if datatype == "BYTES":
        return _of_texts(name, shape, flat, count)
    dtype = _integers(name, datatype)
    if any(type(value) is not int for value in flat):
        wrong = next(value for value in flat if type(value) is not int)
        raise InputError(f"input `{name}` is {datatype} and has {_shown(wrong)}: send whole numbers")
    _check_rows(name, shape, data)
    try:
        values = np.array(flat, dtype=dtype)
    except OverflowError as e:
        raise InputError(f"input `{name}` has a number that {datatype} does not hold") from e
    return _of_numbers(name, shape, values, count)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | bytearray | memoryview) -> Tensor:
    """The tensor in these bytes.

    Raises:
        InputError: they do not go with the datatype or the shape.
    """
    count = _count(name, shape)
    if datatype == "BYTES":
        return _of_texts(name, shape, _elements(name, raw, count), count)
    dtype = _integers(name, datatype)
    if len(raw) != count * dtype.itemsize:
        raise InputError(
            f"input `{name}` has {len(raw)} bytes, and {datatype} of shape {list(shape)} needs {count * dtype.itemsize}"
        )
    return _of_numbers(name, shape, np.frombuffer(raw, dtype=dtype), count)


def to_raw(values: Array | Sequence[str]) -> bytes:
    """The bytes of an output: float32, or texts as BYTES."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, dtype="<f4").tobytes()
    texts = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _count(name: str, shape: Sequence[int]) -> int:
    if any(type(size) is not int or size < 0 for size in shape):
        raise InputError(f"input `{name}` has the shape {list(shape)}: sizes are whole numbers from 0")
    count = prod(shape)
    if count > MOST:
        raise InputError(f"input `{name}` has the shape {list(shape)}: that is too large")
    return count


def _flat(data: Sequence[Any]) -> list[Any]:
    """The elements of lists in lists, in their order."""
    while any(isinstance(part, (list, tuple)) for part in data):
        data = [each for part in data for each in (part if isinstance(part, (list, tuple)) else [part])]
    return list(data)


def _check_rows(name: str, shape: Sequence[int], data: Any) -> None:
    """Refuse rows of other lengths than the shape says, which would have tokens of one row counted to another."""
    if (
        len(shape) != 2
        or not isinstance(data, (list, tuple))
        or not any(isinstance(row, (list, tuple)) for row in data)
    ):
        return
    if len(data) != shape[0] or any(not isinstance(row, (list, tuple)) or len(row) != shape[1] for row in data):
        raise InputError(
            f"input `{name}` has rows that are not of its shape {list(shape)}: "
            f"send {shape[0]} of {shape[1]} each, or all values in one list"
        )


def _integers(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in INTEGERS:
        raise InputError(f"input `{name}` is {datatype}: tokens are {' or '.join(INTEGERS)}, and texts are BYTES")
    return INTEGERS[datatype]


def _of_numbers(name: str, shape: Sequence[int], values: Array, count: int) -> Tensor:
    if values.size != count:
        raise InputError(f"input `{name}` has {values.size} elements, and its shape {list(shape)} says {count}")
    if len(shape) != 2:
        raise InputError(f"input `{name}` has the shape {list(shape)}: send [rows, tokens]")
    return Tensor(name, values.astype(np.int64).reshape(shape))


def _of_texts(name: str, shape: Sequence[int], flat: Sequence[Any], count: int) -> Tensor:
    if len(flat) != count:
        raise InputError(f"input `{name}` has {len(flat)} elements, and its shape {list(shape)} says {count}")
    if len(shape) not in (1, 2) or tuple(shape[1:]) not in ((), (1,)):
        raise InputError(f"input `{name}` has the shape {list(shape)}: send [rows] or [rows, 1], a text each")
    return Tensor(name, [_text(name, value, number) for number, value in enumerate(flat)])


def _text(name: str, value: Any, number: int) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise InputError(f"input `{name}` is BYTES and has {_shown(value)}: send texts")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as e:
        raise InputError("is not UTF-8: encode the text so", number) from e


def _elements(name: str, raw: bytes | bytearray | memoryview, count: int) -> list[bytes]:
    """The elements of BYTES; no more than one too many, which is enough to refuse them."""
    found: list[bytes] = []
    at = 0
    while at < len(raw) and len(found) <= count:
        end = at + 4 + (struct.unpack_from("<I", raw, at)[0] if at + 4 <= len(raw) else 0)
        if at + 4 > len(raw) or end > len(raw):
            raise InputError(
                f"input `{name}` ends within an element: before each BYTES has its length, 4 bytes, little-endian"
            )
        found.append(bytes(raw[at + 4 : end]))
        at = end
    return found


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
