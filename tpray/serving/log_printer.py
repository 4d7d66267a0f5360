"""Prints, in the command that started a server, what the server's processes log; see `tpray.logs.Lines`.

They connect to an abstract Unix address, which the kernel drops with the process. Only the same user's are heard.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import sys
import threading

from tpray.logs import LONGEST_LINE

PREFIX = "tpray-logs-"
MOST_BYTES = 8 * LONGEST_LINE
"""Of a line; a character takes up to four, and an escape in JSON six."""


class LogPrinter:
    """Prints to standard error until `close`. address: where it listens, without the zero byte before it."""

    def __init__(self) -> None:
        self.address = f"{PREFIX}{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print, name="tpray-logs", daemon=True)
        self._thread.start()

    def _print(self) -> None:
        # Once it is over, what has been sent is printed still.
        while (ready := self._selector.select(0.2)) or not self._over.is_set():
            for key, _ in ready:
                sock = key.fileobj
                assert isinstance(sock, socket.socket), "no other is registered"
                if sock is self._listener:
                    self._accept()
                    continue
                try:
                    line = sock.recv(MOST_BYTES)
                except OSError:
                    line = b""
                if line:
                    sys.stderr.write(line.decode(errors="replace") + "\n")
                    sys.stderr.flush()
                else:
                    self._selector.unregister(sock)
                    sock.close()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid in (os.getuid(), 0):
            self._selector.register(sock, selectors.EVENT_READ)
        else:
            sock.close()

    def close(self) -> None:
        """Print what has been sent, and then no more."""
        self._over.set()
        self._thread.join(2)
        self._listener.close()
