"""The servers of this machine: each `tpray serve` tells whoever asks where it is. No Ray.

It does so at an abstract Unix address, which is the machine's and which the kernel drops when the process dies, however
it dies, so that nothing is left behind. Only what a process of the same user says, or of root's, is believed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "tpray-server-"
ASK_S = 2.0
"""How long a server is waited for; one that is stopped (SIGSTOP) says nothing."""


@dataclass(frozen=True)
class ServerRecord:
    """Where a server is. url: of its HTTP. ray_address: of its Ray's control store. model: as the user named it."""

    url: str
    ray_address: str
    model: str
    pid: int


class Announcement:
    """Tells whoever connects what ``record`` says, until `close`."""

    def __init__(self, record: ServerRecord) -> None:
        self._said = json.dumps(asdict(record)).encode()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"\0{PREFIX}{secrets.token_hex(8)}")
        self._socket.listen()
        threading.Thread(target=self._tell, name="tpray-announce", daemon=True).start()

    def _tell(self) -> None:
        while True:
            try:
                asked, _ = self._socket.accept()
                with asked:
                    asked.settimeout(ASK_S)
                    asked.sendall(self._said)
            except OSError:  # closed; or whoever asked has gone
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.1)  # where there are no descriptors left, not at full speed

    def close(self) -> None:
        """Tell nobody any more."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        except OSError as e:
            log.debug("it told nobody: %r", e)
        self._socket.close()


def running_servers() -> list[ServerRecord]:
    """Those of this user that run on this machine, by their URL."""
    names = (line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text().splitlines())
    addresses = {f"\0{name[1:]}" for name in names if name.startswith(f"@{PREFIX}")}
    found = [record for address in addresses if (record := _ask(address)) is not None]
    return sorted(found, key=lambda record: record.url)


def _ask(address: str) -> ServerRecord | None:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(ASK_S)
        try:
            asking.connect(address)
            pid, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (os.getuid(), 0):
                return None
            said = b""
            while part := asking.recv(65536):
                said += part
            record = ServerRecord(**json.loads(said))
        except (OSError, ValueError, TypeError):
            return None
    return record if record.pid == pid else None
