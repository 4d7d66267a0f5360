"""The Python handle: what it gives and raises, which server it is of, and what a restart of that server does to it."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ray.exceptions import RayTaskError

import tpray
from tests.served import Running, start
from tpray.errors import ConfigError, DeadlineError, EmptyInputError, GroupError
from tpray.serving import client
from tpray.serving.app import Classifier
from tpray.serving.handle import Connected, Handle, Response
from tpray.serving.local import LocalClassifier
from tpray.serving.servers import PREFIX, Announcement, ServerRecord, running_servers

if TYPE_CHECKING:
    from typing import assert_type

    from tpray.serving.typed import Entity, LabelScore, RankedDocument

    async def types_that_mypy_checks() -> None:
        handle, local = tpray.connect(), tpray.load()
        assert_type(handle.classify.remote("a").result(), list[LabelScore])
        assert_type(await handle.classify.remote(("a", "b")), list[LabelScore])
        assert_type(handle.classify.remote(["a", ("a", "b")]).result(), list[list[LabelScore]])
        assert_type(handle.classify_tokens.remote("a").result(), list[Entity])
        assert_type(handle.classify_tokens.remote(["a"]).result(), list[list[Entity]])
        assert_type(handle.options(stream=False).rerank.remote("a", ["b"]).result(), list[RankedDocument])
        assert_type(await handle.score.remote("a", ["b"]), list[float])
        assert_type(local.classify("a"), list[LabelScore])
        assert_type(local.classify(["a", "b"]), list[list[LabelScore]])
        assert_type(local.classify_tokens("a"), list[Entity])
        assert_type(local.rerank("a", ["b"]), list[RankedDocument])
        assert_type(local.score("a", ["b"]), list[float])


class Answering:
    """An answer of Serve, as `Response` uses it: ``result`` and ``await`` raise or return what it was made of."""

    def __init__(self, answer: Any = None, never: bool = False) -> None:
        self._answer, self._never = answer, never

    def result(self, timeout_s: float) -> Any:
        if self._never:
            threading.Event().wait(timeout_s)
            raise TimeoutError
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def __await__(self) -> Any:
        if self._never:
            yield from asyncio.sleep(60).__await__()
        return self.result(0)


def wrapped(error: Exception) -> RayTaskError:
    """The error of a replica as Ray raises it: of Ray's class and of the error's."""
    raised: RayTaskError = RayTaskError("classify", "a remote traceback", error).as_instanceof_cause()
    return raised


def answer_of(served: Any, how: str) -> Any:
    response: Response[Any] = Response(served, threading.Event())
    if how == "result":
        return response.result()

    async def wait() -> Any:
        return await response

    return asyncio.run(wait())


@pytest.mark.parametrize("how", ["result", "await"])
def test_what_the_replica_raises_is_raised_itself(how: str) -> None:
    assert answer_of(Answering([1]), how) == [1]
    with pytest.raises(EmptyInputError, match="item 3 is empty") as found:
        answer_of(Answering(wrapped(EmptyInputError("is empty", 3))), how)
    assert type(found.value) is EmptyInputError
    assert found.value.item == 3
    with pytest.raises(DeadlineError, match=r"^late$"):
        answer_of(Answering(wrapped(DeadlineError("late"))), how)
    with pytest.raises(RayTaskError, match="a remote traceback"):  # what nobody expects keeps all that helps to find it
        answer_of(Answering(wrapped(KeyError("a bug"))), how)


@pytest.mark.parametrize("how", ["result", "await"])
def test_an_answer_is_not_awaited_of_a_server_that_is_gone(how: str) -> None:
    over = threading.Event()
    threading.Timer(0.2, over.set).start()
    response: Response[Any] = Response(Answering(never=True), over)

    async def wait() -> Any:
        return await response

    with pytest.raises(GroupError, match="the server that was asked is gone: ask again"):
        response.result() if how == "result" else asyncio.run(wait())


def test_a_time_limit_is_kept() -> None:
    with pytest.raises(TimeoutError, match=r"no answer after 0\.1 s"):
        Response(Answering(never=True), threading.Event()).result(timeout_s=0.1)


def test_the_handles_methods_take_what_the_replicas_and_the_local_ones_do() -> None:
    handle = Handle(lambda: Connected(None, threading.Event()))
    assert dir(handle) == ["classify", "classify_tokens", "options", "rerank", "score"]
    for name in ("classify", "classify_tokens", "rerank"):
        own = dict(inspect.signature(getattr(handle, name).remote).parameters)
        theirs = dict(inspect.signature(getattr(Classifier, name)).parameters)
        del theirs["self"], theirs["traceparent"]  # which the handle gives by itself
        assert list(own) == list(theirs)
        assert [p.default for p in own.values()] == [p.default for p in theirs.values()]
    assert {"classify", "classify_tokens", "rerank", "score"} <= set(dir(LocalClassifier))


def test_tpray_shows_what_there_is() -> None:
    assert dir(tpray) == ["__version__", "connect", "data", "errors", "load", "modules", "parallel_layers", "trace"]
    for name in dir(tpray):
        assert getattr(tpray, name) is not None
    assert (Path(tpray.__file__).parent / "py.typed").exists()


def record(port: int) -> ServerRecord:
    return ServerRecord(f"http://127.0.0.1:{port}", f"127.0.0.1:{port + 1}", f"model {port}", os.getpid())


def mine() -> list[ServerRecord]:
    return [server for server in running_servers() if server.pid == os.getpid()]


def test_servers_say_where_they_are_until_they_end() -> None:
    told = [Announcement(record(port)) for port in (5, 3)]
    try:
        assert mine() == [record(3), record(5)]
    finally:
        told[0].close()
    assert mine() == [record(3)]
    told[1].close()
    assert mine() == []


def test_what_is_no_server_is_not_believed() -> None:
    """What says nothing in time, or something else, or what another process's record would say."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"\0{PREFIX}silent")
        silent.listen()
        other = Announcement(ServerRecord("http://127.0.0.1:1", "127.0.0.1:2", "m", 1))  # process 1's, says this one
        try:
            assert not [server for server in running_servers() if server.url == "http://127.0.0.1:1"]
        finally:
            other.close()


def test_one_of_several_servers_is_chosen_by_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(client, "running_servers", list)
    assert client._choose(None) is None
    monkeypatch.setattr(client, "running_servers", lambda: [record(3)])
    assert client._choose(None) == record(3)
    monkeypatch.setattr(client, "running_servers", lambda: [record(3), record(5)])
    assert client._choose("http://127.0.0.1:5/") == record(5)
    with pytest.raises(ConfigError) as refused:
        client._choose(None)
    assert str(refused.value) == (
        "2 servers run on this machine, http://127.0.0.1:3 (model 3), http://127.0.0.1:5 (model 5): say which, as in "
        'tpray.connect(url="http://127.0.0.1:3")'
    )


CLIENT = """
import sys, time, tpray
url, other = sys.argv[1:]
try:
    tpray.connect()
except tpray.errors.ConfigError as e:
    print("several:", "servers run on this machine" in str(e) and url in str(e) and other in str(e), flush=True)
handle = tpray.connect(url=url)
print("score", len(handle.score.remote("a", ["b", "c"]).result()), flush=True)
try:
    tpray.connect(url=other)
except tpray.errors.ConfigError as e:
    print("other:", e, flush=True)
for wanted in ("gone", "back"):
    sys.stdin.readline()
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            handle.classify.remote("a").result()
            said = "back"
        except tpray.errors.GroupError as e:
            said = "gone" if str(e) == f"the server at {url} is gone: start it, and ask again" else ""
        if said == wanted:
            break
        time.sleep(0.2)
    print(said, flush=True)
"""


@pytest.mark.nightly
@pytest.mark.ray
def test_a_handle_outlives_a_restart_of_its_server(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Of two servers, that it was made for; Ray by itself would end the process a minute after."""
    ports = free_port(), free_port()
    servers: list[Running] = []
    process = None
    try:
        servers += [start(port, tmp_path, "--tp", "1") for port in ports]
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, servers[0].url, servers[1].url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        read = process.stdout.readline
        assert read() == "several: True\n"
        assert read() == "score 2\n"
        assert "ask it from another process, or call ray.shutdown() before" in read()
        servers[0].process.kill()
        servers[0].process.wait(60)
        process.stdin.write("\n")
        process.stdin.flush()
        assert read() == "gone\n"
        servers[0] = start(ports[0], tmp_path, "--tp", "1")
        process.stdin.write("\n")
        process.stdin.flush()
        assert read() == "back\n"
        assert process.wait(60) == 0
    finally:
        for server in servers:
            server.process.send_signal(signal.SIGINT)
        for server in servers:
            server.process.wait(60)
        if process is not None:
            process.kill()
