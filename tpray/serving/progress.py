"""What a starting replica reports to the command that started it: phases as they end, and why it failed.

Datagrams to an abstract Unix address: on one machine, best effort, with nothing to clean up. A replica on
another node, or one that starts long after the command has gone, speaks to nobody, and that is fine. Every user of the
machine may send to such an address (/proc/net/unix lists them): what another user sends is not heard.

Source: unix(7), for SO_PASSCRED and SCM_CREDENTIALS.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import time
from dataclasses import asdict

from tpray import errors
from tpray.group.phases import PhaseReport

LONGEST = 5000
"""Characters of an error; as JSON they fit a datagram, whatever they are."""


class Receiver:
    """The command's end. ``address`` is what replicas are given."""

    def __init__(self) -> None:
        self.address = f"\0tpray-progress-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the kernel says who has sent each
        self._socket.bind(self.address)

    def poll(self, timeout_s: float) -> PhaseReport | errors.TprayError | None:
        """The next phase that ended, the error that a replica failed with, or None after ``timeout_s``."""
        give_up = time.monotonic() + timeout_s
        while (left_s := give_up - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            try:
                data, credentials, *_ = self._socket.recvmsg(65536, socket.CMSG_SPACE(_CREDENTIALS.size))
            except TimeoutError:
                return None
            if _sender(credentials) == os.getuid():
                return _read(data)
        return None

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


_CREDENTIALS = struct.Struct("3i")  # process, user, group


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """The user who has sent a message."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data)[1])
    return None


def _read(data: bytes) -> PhaseReport | errors.TprayError:
    message = json.loads(data)
    if "error" in message:
        return errors.named(message["kind"], message["error"])
    return PhaseReport(**message)


class Sender:
    """The replica's end; without an address it says nothing."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    @property
    def heard(self) -> bool:
        """Whether somebody listens: not so for a replica that takes another's place once the server is up."""
        if self._address is None:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            return sock.connect_ex(self._address) == 0

    def phase(self, report: PhaseReport) -> None:
        """Report a phase that ended."""
        self._send(asdict(report))

    def failed(self, error: Exception) -> None:
        """Report why the start failed."""
        known = isinstance(error, errors.TprayError)
        self._send({"kind": type(error).__name__, "error": (str(error) if known else repr(error))[:LONGEST]})

    def _send(self, message: dict[str, object]) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(json.dumps(message).encode(), self._address)
            except OSError:  # nobody listens any more
                return
