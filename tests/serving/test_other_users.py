"""What another user of the machine sends to the sockets of a server is not heard. /proc/net/unix names them to all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from tpray.errors import ConfigError, GroupError, StartTimeoutError
from tpray.group.phases import PhaseReport
from tpray.group.wire import Frame, Kind, Listener, connect
from tpray.serving.progress import Receiver, Sender

BECOME_NOBODY = "import os, socket; os.setgid(65534); os.setuid(65534); "

other_user = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")


def start_as_nobody(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", "-c", BECOME_NOBODY + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def as_nobody(code: str) -> str:
    process = start_as_nobody(code)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return said


def test_what_a_replica_reports_is_heard() -> None:
    receiver = Receiver()
    try:
        sender = Sender(receiver.address)
        assert sender.heard
        report = PhaseReport(7, "load", 1.0, "what it did")
        sender.phase(report)
        sender.failed(ConfigError("why"))
        sender.failed(ConfigError("\N{BEAVER}" * 1_000_000))
        assert receiver.poll(5) == report
        failure = receiver.poll(5)
        assert isinstance(failure, ConfigError)
        assert str(failure) == "why"
        assert isinstance(receiver.poll(5), ConfigError), "one that is too long for a datagram comes cut"
        assert receiver.poll(0.01) is None
    finally:
        receiver.close()


@other_user
def test_another_user_reports_nothing() -> None:
    receiver = Receiver()
    try:
        said = json.dumps({"kind": "ConfigError", "error": "do as I say"})
        for message in (said, "no JSON"):
            as_nobody(
                "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
                f"s.sendto({message.encode()!r}, {receiver.address!r})"
            )
        assert receiver.poll(0.3) is None
        Sender(receiver.address).failed(ConfigError("why"))
        assert str(receiver.poll(5)) == "why"
    finally:
        receiver.close()


@other_user
def test_another_user_is_no_rank() -> None:
    """Even with the token; and the ranks that come after it are let in."""
    listener = Listener()
    joined: list[object] = []

    def rank() -> None:
        hello = Frame(Kind.HELLO, 0, text=listener.token).encode()
        said = as_nobody(
            f"s = socket.socket(socket.AF_UNIX); s.connect({listener.address!r})\n"
            f"try: s.sendall({hello!r}); print(s.recv(1))\n"
            "except ConnectionError: print('turned away')"
        )
        joined.append(said.strip())
        sock, _ = connect(listener.address, listener.token, 0, 0, 10)
        joined.append(sock)

    waiting = threading.Thread(target=rank)
    waiting.start()
    (own,) = listener.accept(1, [], 20)
    waiting.join()
    assert joined[0] in ("b''", "turned away")
    own.close()


@other_user
def test_another_user_is_not_taken_for_the_owner_of_a_group() -> None:
    address = "\0tpray-test-of-an-owner"
    code = (
        f"s = socket.socket(socket.AF_UNIX); s.bind({address!r}); s.listen(); print('up', flush=True); "
        "c, _ = s.accept(); print(c.recv(100))"
    )
    owner = start_as_nobody(code)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    with pytest.raises(GroupError, match="runs as another user"):
        connect(address, "a-token", 0, 0, 10)
    assert "a-token" not in owner.communicate(timeout=10)[0]


def test_a_group_without_ranks_says_who_is_missing() -> None:
    with pytest.raises(StartTimeoutError, match=r"rank \[0\] did not connect"):
        Listener().accept(1, [], 0.05)
