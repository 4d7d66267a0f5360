"""Clean up after a starter that cannot: a process of its own that outlives whoever started a Ray.

Run as a script by `local.start_ray`, with a pipe as its standard input. When the pipe closes, because the starter
shut Ray down or because it was killed, whatever is left of that Ray is ended and its sockets are removed. Nobody
else can do that: after SIGKILL the raylet and the workers find out by themselves, Ray's agents only a minute later.

Only the standard library is used, so that waiting costs a few megabytes and no CPU.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "TPRAY_RUN"
"""The environment variable that every process of one Ray inherits."""
SCAN_S = 0.1
QUIET_SCANS = 3  # without a process to end: a dying parent may have started one more meanwhile
GIVE_UP_S = 20.0


def leftovers(mark: str, sessions: list[Path]) -> Iterator[tuple[int, int]]:
    """The processes of the Ray that was started with ``mark``: their ids, and a pidfd of each to be closed.

    Ray's agents rewrite their title, and with it the environment that /proc shows; they are known by the log files
    that they hold open. A program that is only connected to this Ray holds such files too, but keeps its own title.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid == os.getpid():
            continue
        try:
            fd = os.pidfd_open(pid)  # first, so that the process that is examined is the one that is ended
        except OSError:
            continue
        try:
            ours = _runs(entry) and (_is_marked(entry, mark) or (_is_titled(entry) and _holds(entry, sessions)))
        except OSError:
            ours = False
        if ours:
            yield pid, fd
        else:
            os.close(fd)


def _runs(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _is_marked(entry: Path, mark: str) -> bool:
    return f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")


def _is_titled(entry: Path) -> bool:
    return (entry / "cmdline").read_bytes().startswith((b"ray::", b"ray-"))


def _holds(entry: Path, sessions: list[Path]) -> bool:
    folders = tuple(f"{session}/" for session in sessions)
    return any(os.readlink(fd).startswith(folders) for fd in (entry / "fd").iterdir())


def sessions_of(temp_dir: Path, starter: int, since: float) -> list[Path]:
    """The session folders that the process ``starter`` has made: Ray ends their names with its id."""
    return [path for path in temp_dir.glob(f"session_2*_{starter}") if path.stat().st_mtime >= since]


def clean_up(mark: str, temp_dir: Path, starter: int, since: float, ended_well: bool) -> None:
    """End what is left, then remove the sockets, and after an orderly end the logs too."""
    started, quiet = time.monotonic(), 0
    while quiet < QUIET_SCANS and time.monotonic() - started < GIVE_UP_S:
        quiet += 1
        for _, fd in leftovers(mark, sessions_of(temp_dir, starter, since)):
            quiet = 0
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it went by itself
            finally:
                os.close(fd)
        time.sleep(SCAN_S)
    for session in sessions_of(temp_dir, starter, since):
        shutil.rmtree(session if ended_well else session / "sockets", ignore_errors=True)


def main() -> None:
    mark, temp_dir, starter, *folders = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
    since = time.time() - 1  # an older folder belongs to another process that had the same id
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ended_well = os.read(0, 1) != b""  # blocks until a byte says so, or the pipe closes
    clean_up(mark, temp_dir, starter, since, ended_well)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
