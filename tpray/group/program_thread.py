"""The one thread of a rank that computes: it loads the program, runs its steps, and owns the only OpenMP pool.

OpenMP keeps a pool of threads for each thread that has computed in parallel. With two such pools a rank has more
threads than cores; libgomp then no longer spins where a parallel loop ends, and every operator waits for the scheduler.
So all work of a rank comes here, its loading and tracing too, and every other thread of the process computes alone.

Source: libgomp's manual on GOMP_SPINCOUNT: fewer spins "when there are more managed threads than available CPUs".
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch

from tpray.errors import RankError

T = TypeVar("T")

ENDED = "this rank's thread has ended: its group has closed, or a step has failed for good"


class ProgramThread:
    """Does what it is given, one after another, and between that what comes from a socket.

    Args:
        name: of the thread.
        threads: of its OpenMP pool, itself included.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._woken, self._wake = os.pipe()
        self._lock, self._ended = threading.Lock(), False  # of the pipe's ends, which close with the thread
        self._leaves = False
        self._serving: tuple[socket.socket, Callable[[socket.socket], bool]] | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()
        self.do(lambda: None)

    def do(self, work: Callable[[], T]) -> T:
        """Have ``work`` done on the thread; what it returns, or raises. The caller computes alone from now on.

        Raises:
            RankError: the thread has ended.
        """
        future: Future[T] = Future()
        self._submit(future, work)
        try:
            return future.result()
        finally:
            # The number that was set last is also that of every thread which has not computed yet.
            torch.set_num_threads(1)

    def end(self) -> None:
        """End the thread, once it has done what it was given; it does nothing to one that has ended."""

        def leave() -> None:
            self._leaves = True

        with suppress(RankError):
            self._submit(Future(), leave)

    def _submit(self, future: Future[T], work: Callable[[], T]) -> None:
        with self._lock:
            if self._ended:
                raise RankError(ENDED)
            self._jobs.append((future, work))
            os.write(self._wake, b"!")

    def serve(self, sock: socket.socket, answer: Callable[[socket.socket], bool]) -> None:
        """Call ``answer`` whenever ``sock`` has something to read, until it returns False or raises; then the thread
        ends, and whoever waits for work gets a `RankError`."""

        def begin() -> None:
            self._serving = sock, answer

        self.do(begin)

    def _run(self) -> None:
        try:
            self._work()
        finally:
            if self._serving is not None:
                self._serving[0].close()  # the other end sees at once that nobody answers any more
            with self._lock:
                self._ended = True
                os.close(self._woken)
                os.close(self._wake)
            for future, _ in self._jobs:
                future.set_exception(RankError(ENDED))

    def _work(self) -> None:
        ready = select.poll()
        ready.register(self._woken, select.POLLIN)
        torch.get_num_threads()  # else the first parallel work would take the number that another thread has set
        torch.set_num_threads(self._threads)
        while not self._leaves:
            if self._serving is not None:
                ready.register(self._serving[0], select.POLLIN)
            while not self._jobs:
                events = ready.poll()
                if self._serving is not None and any(fd != self._woken for fd, _ in events):
                    sock, answer = self._serving
                    if not answer(sock):
                        return
            os.read(self._woken, 1)
            future, work = self._jobs.popleft()
            made: Any = None
            error: BaseException | None = None
            try:
                made = work()
            except BaseException as e:  # noqa: BLE001  # it belongs to whoever waits
                error = e
            torch.set_num_threads(self._threads)  # in case the work has changed it
            if error is None:
                future.set_result(made)
            else:
                future.set_exception(error)
            del future, work, made, error  # nothing here keeps what belongs to the caller
