"""Cores, leases, the wire and the error tree: nothing here needs a group."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from tpray import errors
from tpray.errors import GroupError, StartTimeoutError
from tpray.group import cores, lease, wire
from tpray.group.wire import Frame, FrameParser, Kind


def test_core_ranges_have_no_gaps() -> None:
    assert cores.cut_ranges([0, 1, 2, 4, 5, 6, 7], 2) == [(0, 1), (4, 5), (6, 7)]
    assert cores.cut_ranges([3], 2) == []
    assert cores.describe([0, 1, 2, 5]) == "0-2,5"
    assert [cores.cores_per_rank(8, n) for n in (1, 3, 16)] == [8, 2, 1]


def test_a_lease_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    ranges = [(0, 1), (2, 3)]
    first, second = lease.take(ranges, tmp_path), lease.take(ranges, tmp_path)
    assert first is not None
    assert second is not None
    assert (first.cores, second.cores) == ((0, 1), (2, 3))
    assert lease.take(ranges, tmp_path) is None
    first.release()
    third = lease.take(ranges, tmp_path)
    assert third is not None
    assert third.cores == (0, 1)


def test_frames_survive_any_cut_of_the_stream() -> None:
    frames = [
        Frame(Kind.STEP, 7, (np.arange(6).reshape(2, 3), np.float32([1.5])), 12, "naïve"),
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


def test_every_error_crosses_processes() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) >= 20
    for cls in classes:
        copy = pickle.loads(pickle.dumps(cls("what to do")))
        assert type(copy) is cls
        assert str(copy) == "what to do"
