"""What a starting replica reports to the command that started it: phases as they end, and why it failed.

Datagrams to an abstract Unix address: on one machine, best effort, with nothing to clean up. A replica on
another node, or one that starts long after the command has gone, speaks to nobody, and that is fine.
"""

from __future__ import annotations

import json
import secrets
import socket
from dataclasses import asdict

from tpray import errors
from tpray.group.phases import PhaseReport


class Receiver:
    """The command's end. ``address`` is what replicas are given."""

    def __init__(self) -> None:
        self.address = f"\0tpray-progress-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)

    def poll(self, timeout_s: float) -> PhaseReport | errors.TprayError | None:
        """The next phase that ended, the error that a replica failed with, or None after ``timeout_s``."""
        self._socket.settimeout(timeout_s)
        try:
            message = json.loads(self._socket.recv(65536))
        except TimeoutError:
            return None
        if "error" in message:
            kind = getattr(errors, message["kind"], errors.TprayError)
            failure: errors.TprayError = kind(message["error"])
            return failure
        return PhaseReport(**message)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


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
        self._send({"kind": type(error).__name__, "error": str(error) if known else repr(error)})

    def _send(self, message: dict[str, object]) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(json.dumps(message).encode(), self._address)
            except OSError:  # nobody listens any more
                return
