"""A server under 70 % of the load that it can take, a part of which is killed every minute: ``make soak``.

Prints a row a minute (answers, latency, memory, open files, what was killed) and, at the end, what became of the
requests and how memory and open files grew; draws them into a PNG where matplotlib is installed. Exits with 1 if an
answer was wrong, or if a request was lost in another way than that nobody listened while HAProxy was dead.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.faults.clients import Clients, Tally
from tests.served import Running, children_of, processes_of, start

BODY = {
    "inputs": [
        "The company HuggingFace is based in New York City",
        "HuggingFace's headquarters are situated in Manhattan",
    ]
}
VICTIMS = ("ray::WorkerHost", "ray::WorkerHost", "ray::ServeReplica", "bin/haproxy", "ray::ServeController")
"""What is killed in turn: the first of the server's processes whose command line has these words."""


@dataclass(frozen=True)
class Minute:
    """What a minute was like. latency_ms: the median of single requests beside the load. killed: at its start."""

    minute: int
    answered: int
    latency_ms: float
    memory_bytes: int
    open_files: int
    killed: str


def is_right(answer: Any) -> bool:
    return bool(answer[0]["label"] == "paraphrase")


def resident_and_open(server: Running) -> tuple[int, int]:
    """Resident memory, bytes, and open files of all of the server's processes."""
    memory = files = 0
    for pid in children_of(server.process.pid) | {server.process.pid}:
        try:
            memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except OSError:  # it has just ended
            continue
    return memory, files


def kill(server: Running, words: str) -> None:
    for pid in processes_of(server, words)[:1]:  # none, while it is being replaced
        os.kill(pid, signal.SIGKILL)


class PacedClients(Clients):
    """Clients that together send ``per_second`` requests, or as many as the server answers."""

    def __init__(self, url: str, per_second: float, count: int = 8) -> None:
        self._interval_s = count / per_second
        self._pace = threading.local()
        super().__init__(url, BODY, is_right, count)

    def before(self) -> None:
        due = getattr(self._pace, "due", time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        self._pace.due = max(due + self._interval_s, time.monotonic() - 1)


def capacity(server: Running, seconds: float = 10) -> float:
    """Answers per second to eight clients that ask without pause."""
    clients = Clients(server.url, BODY, is_right)
    clients.wait_for_answers(50)
    before, started = clients.tally.right, time.monotonic()
    time.sleep(seconds)
    rate = (clients.tally.right - before) / (time.monotonic() - started)
    clients.stop()
    return rate


def latency_ms(server: Running, count: int = 21) -> float:
    """The median of single requests; infinite where one fails."""
    host = server.url.removeprefix("http://")
    found = []
    for _ in range(count):
        connection, started = HTTPConnection(host, timeout=10), time.monotonic()
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
        except OSError:
            return float("inf")
        finally:
            connection.close()
        found.append((time.monotonic() - started) * 1e3)
    return sorted(found)[count // 2]


def soak(minutes: int, pause_s: float) -> tuple[list[Minute], Tally]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = start(port, Path(folder), "--tp", "2")
        try:
            rate = 0.7 * capacity(server)
            print(f"{rate:.0f} requests/s, 70 % of what eight clients get", flush=True)
            clients, rows, answered = PacedClients(server.url, rate), [], 0
            for minute in range(minutes):
                victim = VICTIMS[minute % len(VICTIMS)]
                kill(server, victim)
                time.sleep(pause_s)
                right = clients.tally.right
                row = Minute(minute, right - answered, latency_ms(server), *resident_and_open(server), victim)
                answered = right
                rows.append(row)
                print(
                    f"{row.minute:4} {row.answered:7} answered, {row.latency_ms:6.1f} ms, "
                    f"{row.memory_bytes >> 20} MiB, {row.open_files} files, killed {row.killed}",
                    flush=True,
                )
            return rows, clients.stop()
        finally:
            server.process.send_signal(signal.SIGINT)
            server.process.wait(60)


def plot(rows: list[Minute], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, sharex=True, figsize=(9, 9))
    series: list[tuple[str, list[float]]] = [
        ("answers", [row.answered for row in rows]),
        ("latency, ms", [row.latency_ms for row in rows]),
        ("memory, MiB", [row.memory_bytes / 2**20 for row in rows]),
        ("open files", [row.open_files for row in rows]),
    ]
    for axis, (name, values) in zip(axes, series, strict=True):
        axis.plot([row.minute for row in rows], values)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minute; in each of them a part of the server is killed")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--pause", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--plot", type=Path, default=Path("soak.png"))
    options = parser.parse_args()
    rows, tally = soak(options.minutes, options.pause)
    print(tally.row("soak"))
    settled = rows[len(rows) // 3 :]
    print(
        f"from minute {settled[0].minute} to {settled[-1].minute}: memory x "
        f"{settled[-1].memory_bytes / settled[0].memory_bytes:.2f}, open files x "
        f"{settled[-1].open_files / settled[0].open_files:.2f}; the longest request took {tally.longest_s:.1f} s"
    )
    try:
        plot(rows, options.plot)
        print(f"drawn in {options.plot}")
    except ImportError:
        print("no plot: matplotlib is an extra (pip install -e '.[bench]')")
    sys.exit(1 if tally.wrong or tally.lost_unheard < tally.lost.total() else 0)


if __name__ == "__main__":
    main()
