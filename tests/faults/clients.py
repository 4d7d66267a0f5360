"""Clients that ask without pause, know the right answer, and count what becomes of each request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

PAUSE_S = 0.1
"""After anything but an answer."""


UNHEARD = ("ConnectionRefusedError", "RemoteDisconnected", "ConnectionResetError", "BrokenPipeError")


@dataclass
class Tally:
    """What became of the requests.

    refused: honest errors, by HTTP status: JSON of the dialect, and 503 and 429 with Retry-After. lost: anything else:
    a dropped connection, a silent client's timeout, an error in another form. recovered_s: the longest time between two
    right answers.
    """

    right: int = 0
    wrong: list[Any] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    recovered_s: float = 0.0

    @property
    def lost_unheard(self) -> int:
        """How many of those were lost because nobody listened: no connection was accepted, or it was cut."""
        return sum(count for reason, count in self.lost.items() if reason.startswith(UNHEARD))

    @property
    def sent(self) -> int:
        """All of them."""
        return self.right + len(self.wrong) + self.refused.total() + self.lost.total()

    def row(self, fault: str) -> str:
        """A row of the README's table."""
        refused = ", ".join(f"{count} x {status}" for status, count in sorted(self.refused.items())) or "0"
        return (
            f"| {fault} | {self.sent} | {self.right} | {refused} | {self.lost.total()} | {len(self.wrong)} | "
            f"{self.recovered_s:.1f} s |"
        )


class Clients:
    """``count`` clients, each with a connection of its own, until `stop`.

    Args:
        url: of the server, or of a model of several.
        body: what all of them ask.
        is_right: whether an answer is.
        timeout_s: how long a client waits; longer than a request may take.
    """

    def __init__(
        self, url: str, body: Any, is_right: Callable[[Any], bool], count: int = 8, timeout_s: float = 80.0
    ) -> None:
        self.tally = Tally()
        self._address, self._path = urlsplit(url).netloc, f"{urlsplit(url).path}/predict"
        self._body, self._is_right, self._timeout_s = json.dumps(body), is_right, timeout_s
        self._lock = threading.Lock()
        self._last_right = time.monotonic()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop_soon(self) -> None:
        """Let every client finish its request, or make its first one, and do not wait for that."""
        self._over.set()

    def stop(self) -> Tally:
        """Let every client finish its request, and say what became of all."""
        self.stop_soon()
        for thread in self._threads:
            thread.join(self._timeout_s + 5)
            assert not thread.is_alive(), "a request hangs"
        return self.tally

    def wait_for_answers(self, count: int = 20, limit_s: float = 120.0) -> None:
        """Wait until so many more right answers have come."""
        wanted, give_up = self.tally.right + count, time.monotonic() + limit_s
        while self.tally.right < wanted:
            assert time.monotonic() < give_up, self.tally
            time.sleep(0.05)

    def before(self) -> None:
        """Called by each client before each request."""

    def _ask(self) -> None:
        connection = HTTPConnection(self._address, timeout=self._timeout_s)
        first = True
        while first or not self._over.is_set():
            first = False
            self.before()
            started = time.monotonic()
            try:
                connection.request("POST", self._path, self._body, {"content-type": "application/json"})
                response = connection.getresponse()
                status, headers, text = response.status, response.headers, response.read()
            except (OSError, HTTPException) as e:
                connection.close()
                self._count(started, lost=f"{type(e).__name__}: {e}")
                continue
            if status == 200:
                self._count(started, answer=json.loads(text))
            elif not _is_honest(status, headers.get("retry-after"), text):
                self._count(started, lost=f"{status} {text[:80]!r}")
            else:
                self._count(started, refused=status)
        connection.close()

    def _count(self, started: float, answer: Any = None, refused: int | None = None, lost: str | None = None) -> None:
        now = time.monotonic()
        with self._lock:
            tally = self.tally
            tally.longest_s = max(tally.longest_s, now - started)
            if lost is not None:
                tally.lost[lost] += 1
            elif refused is not None:
                tally.refused[refused] += 1
            elif self._is_right(answer):
                tally.right += 1
                tally.recovered_s = max(tally.recovered_s, now - self._last_right)
                self._last_right = now
                return
            else:
                tally.wrong.append(answer)
        time.sleep(PAUSE_S)


def _is_honest(status: int, retry_after: str | None, text: bytes) -> bool:
    """An error as the dialect has it, of a kind that a fault may cause."""
    try:
        body = json.loads(text)
    except ValueError:
        return False
    if status in (429, 503) and not (retry_after or "").isdecimal():
        return False
    return status in (429, 503, 504) and set(body) == {"error", "error_type"}
