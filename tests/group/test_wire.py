"""The wire: frames, and who may join."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest

from tpray.errors import GroupError, StartTimeoutError
from tpray.group import wire
from tpray.group.wire import Frame, FrameParser, Kind


def test_frames_survive_any_cut_of_the_stream() -> None:
    frames = [
        Frame(Kind.STEP, 7, (np.arange(6).reshape(2, 3), np.array([1.5], dtype=np.float32)), 12, "naïve"),
        Frame(Kind.RESULT, 8),
        Frame(Kind.STEP, 9, (np.zeros((0, 4), dtype=np.int64),)),
    ]
    stream = b"".join(f.encode() for f in frames)
    for size in (1, 7, 64, len(stream)):
        parser, found = FrameParser(), []
        for start in range(0, len(stream), size):
            found += parser.feed(stream[start : start + size])
        assert [(f.kind, f.step, f.micros, f.text) for f in found] == [
            (f.kind, f.step, f.micros, f.text) for f in frames
        ]
        for a, b in zip(found, frames, strict=True):
            for x, y in zip(a.tensors, b.tensors, strict=True):
                assert np.array_equal(x, y)
                assert x.dtype == y.dtype


def test_a_frame_is_as_the_picture_says() -> None:
    """Read by the picture in the module's docstring alone."""
    ids, scores = np.arange(6, dtype=np.int64).reshape(2, 3), np.array([1.5], dtype=np.float32)
    data = Frame(Kind.RESULT, 7, (ids, scores), 12, "naïve", 5).encode()
    magic, kind, tensors, _, text, step, micros, waited, body = struct.unpack_from("<4sBBHIQQqQ", data)
    assert (magic, kind, tensors, text, step, micros, waited) == (b"TPR2", 3, 2, len("naïve".encode()), 7, 12, 5)
    rest = data[struct.calcsize("<4sBBHIQQqQ") :]
    assert len(rest) == body
    (length,) = struct.unpack_from("<I", rest)
    table = rest[4 : 4 + length]
    assert struct.unpack("<BBHII", table[:12]) == (0, 2, 0, 2, 3)
    assert struct.unpack("<BBHI", table[12:]) == (2, 1, 0, 1)
    assert rest[4 + length :] == ids.tobytes() + scores.tobytes() + "naïve".encode()


def test_a_foreign_header_is_refused() -> None:
    with pytest.raises(GroupError, match="unknown header"):
        FrameParser().feed(b"HTTP/1.1 200 OK" + b" " * 64)


def test_only_a_rank_with_the_token_gets_in() -> None:
    listener = wire.Listener()

    refused: list[str] = []

    def impostor() -> None:
        try:
            wire.connect(listener.address, "wrong", 0, 1, 1.0)
        except GroupError as e:
            refused.append(str(e))

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(StartTimeoutError, match=r"rank \[0\] did not connect"):
        listener.accept(1, [0], 0.5)
    thread.join()
    assert "refused" in refused[0]
