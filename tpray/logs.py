"""What tpray's processes log, as text or as JSON lines, and where the lines go.

Nothing that a client sends can make a line of its own: in text, what is not printable is written as Python escapes
(``\\n``), and the lines of a traceback are indented; in JSON the encoding sees to it.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tpray.config import LogFormat, log_address, log_format, log_level

Context = Callable[[], Mapping[str, Any]]
"""What is said of whatever a process does just now, beside each of its messages: ``request_id``, say."""

LONGEST_LINE = 32_768
"""Characters; a longer line is cut, and of a traceback the beginning."""

_RANK = re.compile(r"tpray-rank-(\d+)")
_PLAIN = re.compile(r"[\w.:/+@*-]+", re.ASCII)


@dataclass(frozen=True)
class LogSettings:
    """How a process logs. level: of tpray's messages. address: see `Lines`; "": there is none."""

    level: str
    form: LogFormat = "text"
    address: str = ""

    @classmethod
    def of_environment(cls) -> LogSettings:
        """As this process's environment says.

        Raises:
            ConfigError: it names a level or a form that does not exist.
        """
        return cls(log_level(), log_format(), log_address())


def printable(text: str) -> str:
    """``text`` on one line, with escapes for what is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Formatter(logging.Formatter):
    """Makes a line of a message, its ``fields`` (an ``extra`` of the call) and the context."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        rank = _RANK.fullmatch(record.threadName or "")
        found = {**self._context(), **({"rank": int(rank[1])} if rank else {}), **getattr(record, "fields", {})}
        return {name: value for name, value in found.items() if value not in (None, "")}

    def trace(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""


class TextLines(_Formatter):
    """``LEVEL logger: message name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{record.levelname} {record.name}: {printable(record.getMessage())}"
        line += "".join(f" {name}={_value(value)}" for name, value in self.fields(record).items())
        trace = "".join(f"\n    {printable(each)}" for each in self.trace(record).splitlines())
        if len(trace) > LONGEST_LINE:
            trace = "\n    ..." + trace[-LONGEST_LINE:]
        return line[:LONGEST_LINE] + trace


def _value(value: Any) -> str:
    """In quotes, unless it is one plain word: nothing in it is taken for another value."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class JsonLines(_Formatter):
    """An object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said = {"time": time.replace("+00:00", "Z"), "level": record.levelname, "logger": record.name}
        said["message"] = record.getMessage()[:LONGEST_LINE]
        if trace := self.trace(record):
            said["exception"] = trace[-LONGEST_LINE:]
        return json.dumps(said | self.fields(record), default=str)


class Lines(logging.Handler):
    """Has the command that started this process print its lines, and where there is none prints them itself.

    Nothing waits for the command: while it does not take lines they are lost, and counted.

    Args:
        address: the abstract Unix address at which the command listens (`serving.log_printer`); "": there is none.
    """

    def __init__(self, address: str = "") -> None:
        super().__init__()
        self._address, self._lost = address, 0
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if not self._told(line):
                print(line, file=sys.__stderr__, flush=True)
        except Exception:  # noqa: BLE001  # logging's own way: an error in a handler is no error of who logs
            self.handleError(record)

    def _told(self, line: str) -> bool:
        """Whether there is a command, and so no need to print."""
        if not self._address:
            return False
        try:
            if self._socket is None:
                self._socket = self._connected()
            if self._lost:
                lost = f"{self._lost} lines were lost here: they came faster than they could be printed"
                record = logging.makeLogRecord({"msg": lost, "levelname": "WARNING", "name": __name__})
                self._socket.send(self.format(record).encode())
                self._lost = 0
            self._socket.send(line.encode(errors="backslashreplace"))
        except BlockingIOError:
            self._lost += 1
        except OSError as e:
            if e.errno != errno.EMSGSIZE:  # the command has gone, or is of another machine
                self._address = ""
            return False
        return True

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)  # where many others connect, too, it would wait for the command
            sock.connect(f"\0{self._address}")
        except OSError:
            sock.close()
            raise
        return sock


_settings: LogSettings | None = None


def current() -> LogSettings:
    """How this process logs; before `set_up`, how its environment says that it should."""
    return _settings or LogSettings.of_environment()


def in_json() -> bool:
    """Whether this process has been told to log JSON lines."""
    return _settings is not None and _settings.form == "json"


def set_up(settings: LogSettings, context: Context = dict) -> None:
    """Have this process log tpray's messages from a level on, and others' warnings."""
    global _settings
    _settings = settings
    root = logging.root
    for handler in list(root.handlers):
        if isinstance(handler, Lines):
            root.removeHandler(handler)
    if not root.handlers or settings.address:  # else a host of ours, such as pytest, has its own
        lines = Lines(settings.address)
        lines.setFormatter((JsonLines if settings.form == "json" else TextLines)(context))
        root.addHandler(lines)
    root.setLevel(logging.WARNING)
    logging.getLogger("tpray").setLevel(settings.level)
