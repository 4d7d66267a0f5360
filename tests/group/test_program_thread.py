"""The thread on which a rank computes: all of its work, one after another, and the process's only OpenMP pool."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time

import pytest

from tpray.errors import RankError
from tpray.group.program_thread import ProgramThread
from tpray.group.thread_executor import ThreadExecutor


def test_work_is_done_on_the_thread_in_turn_and_its_errors_are_the_callers() -> None:
    thread = ProgramThread("tpray-test", 1)
    assert thread.do(threading.current_thread).name == "tpray-test"
    with pytest.raises(ZeroDivisionError):
        thread.do(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        thread.do(lambda: sys.exit(3))
    assert thread.do(lambda: 5) == 5, "it goes on after an error"


def test_a_socket_is_answered_between_works_until_it_ends() -> None:
    ours, theirs = socket.socketpair()
    thread = ProgramThread("tpray-test", 1)
    own = thread.do(threading.current_thread)

    def answer(sock: socket.socket) -> bool:
        said = sock.recv(100)
        if said:
            sock.send(threading.current_thread().name.encode() + b" " + said)
        return bool(said)

    thread.serve(theirs, answer)
    for number in range(3):
        ours.send(str(number).encode())
        assert ours.recv(100).decode() == f"tpray-test {number}"
        assert thread.do(threading.current_thread).name == "tpray-test"
    ours.close()
    own.join(10)
    assert not own.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_answer_that_raises_ends_the_thread_and_the_connection() -> None:
    ours, theirs = socket.socketpair()
    thread = ProgramThread("tpray-test", 1)
    own = thread.do(threading.current_thread)
    thread.serve(theirs, lambda sock: bool(1 // 0))
    ours.send(b"x")
    own.join(10)
    assert not own.is_alive()
    with pytest.raises(RankError, match="has ended"):
        thread.do(lambda: 5)
    ours.settimeout(5)
    with pytest.raises(ConnectionResetError):  # something was sent that nobody has read
        ours.recv(1)


def test_a_thread_that_is_told_to_end_does_its_work_before_and_none_after() -> None:
    thread = ProgramThread("tpray-test", 1)
    own = thread.do(threading.current_thread)
    done: list[int] = []

    def work() -> None:
        time.sleep(0.2)
        done.append(1)

    waiting = threading.Thread(target=thread.do, args=(work,))
    waiting.start()
    time.sleep(0.05)
    thread.end()
    own.join(10)
    waiting.join(10)
    assert done == [1]
    with pytest.raises(RankError, match="has ended"):
        thread.do(lambda: 5)
    thread.end()


def test_ranks_that_are_threads_end_with_their_group() -> None:
    async def run() -> None:
        executor = ThreadExecutor(2)
        await executor.spawn()  # a start that fails before the ranks are connected
        await executor.kill()

    before = set(threading.enumerate())
    asyncio.run(run())
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread.name


COUNT = """
import os, threading, time
import torch
from tpray.group.program_thread import ProgramThread

def multiply():
    x = torch.randn(512, 512)
    return (x @ x).relu().sum()

def tasks():  # threads that Python did not start: those of OpenMP's pools, and idle ones of torch's other pool
    return len(os.listdir("/proc/self/task")) - threading.active_count()

thread = ProgramThread("rank", 3)
before = tasks()
multiply()  # as a library might, on the main thread
thread.do(multiply)
thread.do(lambda: torch.set_num_threads(1))  # as a user's model might
assert thread.do(torch.get_num_threads) == 3
other = threading.Thread(target=multiply)
other.start()
other.join()
thread.do(multiply)
time.sleep(0.1)
print(tasks() - before)
"""


def test_a_rank_has_one_pool_whatever_computes_where() -> None:
    ran = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == ["2"], "three threads, of which the program's own is one"
