"""The wire between a group's owner and its ranks: one Unix stream socket per rank, one frame each way a step.

A frame is a header and a body::

    header  magic "TPR2" | kind u8 | tensors u8 | pad u16 | text u32 | step u64 | micros u64 | waited i64 | body u64
    body    table u32, its length in bytes
            table, for each tensor: dtype u8 | dimensions u8 | pad u16 | size u32 x dimensions
            the tensors' bytes in order, C-contiguous
            the text in UTF-8

Numbers are little-endian; ``text`` and ``body`` in the header are lengths in bytes.

The address is an abstract one (Linux): it has no file, so nothing is left behind by a kill -9. Both ends check
that the other runs as the same user, and a rank must present the group's token. A stream, not a packet
socket: a packet cannot exceed the socket's buffer (208 KiB by default), a frame can.

Source: unix(7), for abstract addresses, SO_PEERCRED and SCM_RIGHTS.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from tpray.errors import ConfigError, GroupError, StartTimeoutError

Array = npt.NDArray[Any]

_HEADER = struct.Struct("<4sBBHIQQqQ")
_ENTRY = struct.Struct("<BBH")
_MAGIC = b"TPR2"
_DTYPES = tuple(np.dtype(name) for name in ("int64", "int32", "float32", "float64", "bool", "uint8", "float16"))
MAX_FRAME_BYTES = 1 << 30


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1  # rank -> owner: text is the token, step the rank's number
    STEP = 2  # owner -> rank: tensors are the program's inputs
    BEGIN = 7  # owner -> rank: the same, of a step that goes in parts; do the first
    NEXT = 8  # owner -> rank: do the next part of the step that began last
    RESULT = 3  # rank -> owner: rank 0 adds the output, or that of a part, which is empty; the others only acknowledge
    ERROR = 4  # rank -> owner: text says what was raised, and a tensor, int64, how many exchanges came before it
    FAULT = 6  # rank -> owner: the same, raised by a collective, say; it cannot be what the step was given
    PROGRESS = 5  # rank -> owner: text says what has been done, of the start-up phase that is going on


@dataclass(frozen=True)
class Frame:
    """What crosses the wire.

    step: the number the answer repeats. tensors: CPU arrays, owned by the receiver once decoded.
    micros: how long the rank computed, microseconds. waited: so much of it for other ranks; -1: that is not known.
    """

    kind: Kind
    step: int = 0
    tensors: tuple[Array, ...] = field(default=())
    micros: int = 0
    text: str = ""
    waited: int = -1

    def encode(self) -> bytes:
        """The frame as bytes.

        Raises:
            ConfigError: the wire does not carry a tensor's dtype.
        """
        unknown = [str(a.dtype) for a in self.tensors if a.dtype not in _DTYPES]
        if unknown:
            known = ", ".join(map(str, _DTYPES))
            raise ConfigError(f"a tensor of {unknown[0]} cannot go to or from a rank: convert it to one of {known}")
        arrays = [np.asarray(a, order="C") for a in self.tensors]  # ascontiguousarray gives a number a dimension
        text = self.text.encode()
        table = b"".join(
            _ENTRY.pack(_DTYPES.index(a.dtype), a.ndim, 0) + struct.pack(f"<{a.ndim}I", *a.shape) for a in arrays
        )
        body = b"".join([struct.pack("<I", len(table)), table, *(a.tobytes() for a in arrays), text])
        header = _HEADER.pack(
            _MAGIC, self.kind, len(arrays), 0, len(text), self.step, self.micros, self.waited, len(body)
        )
        return header + body


def _parse(header: bytes | bytearray | memoryview, body: bytearray | bytes) -> Frame:
    _, kind, count, _, text_length, step, micros, waited, _ = _HEADER.unpack(header)
    (table_length,) = struct.unpack_from("<I", body)
    entry, data = 4, 4 + table_length
    tensors: list[Array] = []
    for _ in range(count):
        code, dimensions, _ = _ENTRY.unpack_from(body, entry)
        shape = struct.unpack_from(f"<{dimensions}I", body, entry + _ENTRY.size)
        entry += _ENTRY.size + 4 * dimensions
        array = np.frombuffer(body, _DTYPES[code], int(np.prod(shape, dtype=np.int64)), data).reshape(shape)
        data += array.nbytes
        tensors.append(array)
    text = bytes(body[data : data + text_length]).decode(errors="replace")
    return Frame(Kind(kind), step, tuple(tensors), micros, text, waited)


def _body_bytes(header: bytes | bytearray | memoryview) -> int:
    magic, *_, length = _HEADER.unpack(header)
    if magic != _MAGIC or length > MAX_FRAME_BYTES:
        raise GroupError("a frame on the group's wire has an unknown header; are all ranks of one tpray version?")
    return int(length)


class FrameParser:
    """Cuts a stream of bytes into frames; for the owner's event loop."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Add bytes as they came; return the frames that are complete now."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= _HEADER.size:
            end = _HEADER.size + _body_bytes(self._buffer[: _HEADER.size])
            if len(self._buffer) < end:
                break
            frames.append(_parse(self._buffer[: _HEADER.size], bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]
        return frames


def receive(sock: socket.socket) -> Frame | None:
    """Block until a whole frame came; None when the other end is gone. For the rank's loop."""
    header = _receive_exactly(sock, _HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(sock, _body_bytes(header))
    return None if body is None else _parse(header, body)


def _receive_exactly(sock: socket.socket, length: int) -> bytearray | None:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        try:
            count = sock.recv_into(view)
        except ConnectionError:
            return None
        if count == 0:
            return None
        view = view[count:]
    return buffer


class Listener:
    """The owner's end before the ranks are there."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.address = f"\0tpray-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.address)
        self._socket.listen(64)

    def accept(self, ranks: int, fds: Sequence[int], timeout_s: float) -> list[socket.socket]:
        """Wait for every rank's hello, hand each the file descriptors, return their sockets in rank order.

        Raises:
            StartTimeoutError: some rank did not come in time; it is named.
        """
        found: dict[int, socket.socket] = {}
        try:
            while len(found) < ranks:
                self._socket.settimeout(timeout_s)
                sock, _ = self._socket.accept()
                sock.settimeout(timeout_s)
                hello = receive(sock) if _same_user(sock) else None
                known = hello is not None and secrets.compare_digest(hello.text, self.token)
                if hello is None or not known or not 0 <= hello.step < ranks:
                    sock.close()
                    continue
                socket.send_fds(sock, [b"F"], list(fds))
                found[hello.step] = sock
        except TimeoutError as e:
            missing = sorted(set(range(ranks)) - set(found))
            raise StartTimeoutError(f"rank {missing} did not connect within {timeout_s:.0f} s") from e
        except OSError as e:
            for sock in found.values():
                sock.close()
            raise GroupError(f"the group's owner listens no longer: {e}") from e
        finally:
            self._socket.close()
        return [found[rank] for rank in range(ranks)]

    def close(self) -> None:
        """Stop listening; an `accept` in another thread ends."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # close() alone would leave that thread waiting
        except OSError:  # it has ended, and closed the socket
            return
        self._socket.close()


def connect(address: str, token: str, rank: int, fds: int, timeout_s: float) -> tuple[socket.socket, list[int]]:
    """The rank's end: connect, say hello, receive ``fds`` file descriptors.

    Raises:
        GroupError: the owner is gone or runs as somebody else.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(address)
        if not _same_user(sock):
            raise GroupError(f"rank {rank}: the group's owner runs as another user")
        sock.sendall(Frame(Kind.HELLO, rank, text=token).encode())
        _, received, _, _ = socket.recv_fds(sock, 1, fds)
    except OSError as e:
        sock.close()
        raise GroupError(f"rank {rank} could not reach its group's owner: {e}") from e
    if len(received) != fds:
        sock.close()
        raise GroupError(f"rank {rank} was refused by its group's owner")
    sock.settimeout(None)
    return sock, received


def _same_user(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())
