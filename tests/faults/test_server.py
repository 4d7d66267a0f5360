"""One server, whose parts are killed one after another under load: HAProxy, the controller, the replica, Ray."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.clients import Clients, Tally
from tests.served import Running, assert_all_gone, children_of, processes_of, start

pytestmark = pytest.mark.ray

PAIR = ["The company HuggingFace is based in New York City", "HuggingFace's headquarters are situated in Manhattan"]
BODY = {"inputs": PAIR}
Report = Callable[[str, Tally], None]


def is_right(answer: Any) -> bool:
    return bool(answer[0]["label"] == "paraphrase" and abs(answer[0]["score"] + answer[1]["score"] - 1) < 1e-6)


def process_of(server: Running, title: str) -> int:
    """The newest process of a server whose command line has ``title``."""
    found = processes_of(server, title)
    assert found, title
    return found[-1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Running]:
    running = start(free_port(), tmp_path_factory.mktemp("faults"), "--tp", "2")
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGINT)
        running.process.wait(60)


def test_haproxy_killed(server: Running, report: Report) -> None:
    clients = Clients(server.url, BODY, is_right)
    clients.wait_for_answers()
    os.kill(process_of(server, "bin/haproxy"), signal.SIGKILL)
    time.sleep(1)
    clients.wait_for_answers()
    tally = clients.stop()
    report("HAProxy killed", tally)
    # Nobody is there to refuse while nobody listens: connections fail, and nothing else does.
    assert tally.lost_unheard == tally.lost.total(), tally
    assert not tally.wrong
    print(f"back after {tally.recovered_s:.1f} s")


def test_the_controller_and_serves_own_proxy_killed(server: Running, report: Report) -> None:
    clients = Clients(server.url, BODY, is_right)
    clients.wait_for_answers()
    os.kill(process_of(server, "ray::ServeController"), signal.SIGKILL)
    os.kill(process_of(server, "ray::ProxyActor"), signal.SIGKILL)
    time.sleep(4)
    clients.wait_for_answers()
    tally = clients.stop()
    report("controller and Serve's proxy killed", tally)
    assert not tally.wrong
    assert not tally.lost, tally
    assert not tally.refused, tally


def test_the_replica_killed(server: Running, report: Report) -> None:
    """What was under way gets 503, as does what comes until there is a new one; at once, and no connection drops."""
    clients = Clients(server.url, BODY, is_right)
    clients.wait_for_answers()
    replica = process_of(server, "ray::ServeReplica")
    os.kill(replica, signal.SIGKILL)
    while not clients.tally.refused:
        time.sleep(0.01)
    asked = time.monotonic()
    answer = server.predict(BODY)
    assert answer.status_code in (200, 503)
    print(f"answered {answer.status_code} after {time.monotonic() - asked:.2f} s")
    if answer.status_code == 503:
        assert answer.json()["error"] == "no replica can answer now: try again later"
        assert int(answer.headers["retry-after"]) >= 1
    clients.wait_for_answers()
    tally = clients.stop()
    report("replica killed", tally)
    assert not tally.wrong
    assert not tally.lost, tally
    assert set(tally.refused) == {503}


@pytest.mark.nightly
def test_a_replica_that_hangs_for_five_seconds(server: Running, report: Report) -> None:
    """What it has taken it answers late; newcomers get 503 as soon as two checks have failed, and so nobody waits."""
    clients = Clients(server.url, BODY, is_right)
    clients.wait_for_answers()
    replica = process_of(server, "ray::ServeReplica")
    os.kill(replica, signal.SIGSTOP)
    time.sleep(5)
    os.kill(replica, signal.SIGCONT)
    clients.wait_for_answers()
    tally = clients.stop()
    report("replica stopped for 5 s", tally)
    assert not tally.wrong
    assert not tally.lost, tally
    assert tally.longest_s < 15


@pytest.mark.nightly
def test_more_connections_than_it_takes_wait(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "8")
    server = start(free_port(), tmp_path)
    waiting = [Clients(server.url, BODY, is_right, count=1) for _ in range(60)]
    for client in waiting:
        client.stop_soon()
    assert sum(client.stop().right for client in waiting) >= 60
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0


def test_a_replica_answers_only_its_own_server(server: Running) -> None:
    listening = [conn for conn in _listeners(process_of(server, "ray::ServeReplica")) if 20000 <= conn < 30000]
    assert len(listening) == 1
    direct = f"http://127.0.0.1:{listening[0]}"
    for headers in ({}, {"x-tpray-server": "0" * 32}):
        for path in ("/predict", "/info", "/health"):
            answer = httpx.request("POST" if path == "/predict" else "GET", direct + path, json=BODY, headers=headers)
            assert answer.status_code == 421, path
            assert "another server" in answer.json()["error"]
    forged = httpx.post(f"{server.url}/predict", json=BODY, headers={"x-tpray-server": "0" * 32})
    assert forged.status_code == 200  # HAProxy shows its own


@pytest.mark.parametrize(
    "header",
    ["x-request-id", "x-request-timeout-seconds", "x-request-disconnect-disabled", "serve_multiplexed_model_id"],
)
@pytest.mark.parametrize("value", [b"\xff", b"\xc3(", b"nan", b"-1", b"x" * 3000])
def test_headers_that_serve_reads_make_no_error_of_its_own(server: Running, header: str, value: bytes) -> None:
    for path in ("/predict", "/info"):
        answer = httpx.request(
            "POST" if path == "/predict" else "GET",
            server.url + path,
            json=BODY,
            headers={header.encode(): value},
            timeout=60,
        )
        refused = header == "x-request-timeout-seconds" and path == "/predict"
        assert answer.status_code == (422 if refused else 200), answer.text
        assert isinstance(answer.json(), (list, dict))


@pytest.mark.parametrize("seconds", ["0.0005", "0.005", "0.05"])
def test_a_client_in_a_great_hurry_gets_504_in_the_dialects_form(server: Running, seconds: str) -> None:
    for _ in range(20):
        answer = server.predict(BODY, headers={"x-request-timeout-seconds": seconds})
        assert answer.status_code in (200, 504), answer.text
        if answer.status_code == 504:
            assert answer.json()["error_type"] == "Backend"


def _listeners(pid: int) -> list[int]:
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(fields[1].split(":")[1], 16) for fields in lines if fields[3] == "0A" and fields[9] in inodes]


HEAD = b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sent", "status"),
    [(HEAD % 100 + b'{"inputs":', b"408"), (HEAD % 300_000 + b'{"inputs":"' + b"a " * 75_000, b"400"),
     (b"POST /pre", b"408"), (b"no HTTP at all\r\n\r\n", b"400")],
    ids=["half a body", "half a large body", "half a head", "no HTTP"],
)  # fmt: skip
def test_a_client_that_stops_sending_is_told_so_and_goes(server: Running, sent: bytes, status: bytes) -> None:
    """Within ten seconds. Before the head is whole HAProxy has words of its own, which cannot be changed."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(sent)
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert client.recv(1) == b""
    if HEAD[:20] in sent[:20]:
        assert b'"error_type":"Validation"' in answer
    assert server.predict(BODY).status_code == 200


@pytest.mark.nightly
def test_what_is_under_way_is_answered_before_the_end(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """SIGTERM: 32 requests wait for a rank that is stopped for two seconds; newcomers are refused meanwhile."""
    server = start(free_port(), tmp_path, "--tp", "2")
    rank = server.info()["ranks"][1]["pid"]
    os.kill(rank, signal.SIGSTOP)
    waiting = [Clients(server.url, BODY, is_right, count=1) for _ in range(32)]
    for client in waiting:
        client.stop_soon()  # one request each
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    give_up = time.monotonic() + 10
    while (refused := server.predict(BODY, headers={"x-request-timeout-seconds": "1"})).status_code != 503:
        assert time.monotonic() < give_up, refused.text
    assert "stopping" in refused.json()["error"]
    os.kill(rank, signal.SIGCONT)
    tallies = [client.stop() for client in waiting]
    assert sum(tally.right for tally in tallies) == 32, tallies
    assert server.process.wait(60) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.nightly
def test_a_signal_to_the_whole_process_group_ends_it_soon(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """As `timeout` and systemd send it: Ray's own processes end too, and nobody waits for their answer."""
    starting = (
        f"import os; os.setpgid(0, 0); os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'tpray', 'serve', "
    )
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", f"{starting}'--port', '{free_port()}'])"], stdout=log, stderr=log,
        env=os.environ | {"TPRAY_CACHE": str(tmp_path), "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    give_up = time.monotonic() + 180
    while "Ready" not in (said := (tmp_path / "log").read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < give_up, said
        time.sleep(0.2)
    family = children_of(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(25) in (0, 1)
    assert_all_gone(family, within_s=5)


def test_the_command_ends_when_its_ray_is_gone(server: Running) -> None:
    os.kill(process_of(server, "gcs_server"), signal.SIGKILL)
    assert server.process.wait(60) == 1
    said = server.log.read_text()
    assert "tpray: the server is gone: Ray's gcs_server has ended" in said
    assert "Traceback" not in said


@pytest.mark.nightly
def test_the_command_ends_when_no_replica_can_be_started(
    tmp_path: Path, free_port: Callable[[], int], make_checkpoint: Callable[..., Path]
) -> None:
    """The model's files vanish while it is served, and then the replica."""
    model = tmp_path / "model"
    shutil.copytree(make_checkpoint(), model)
    server = start(free_port(), tmp_path, str(model))
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "cache")
    os.kill(process_of(server, "ray::ServeReplica"), signal.SIGKILL)
    assert server.process.wait(300) == 1
    said = server.log.read_text()
    assert "tpray: the server is gone: no replica could be started for 60 s" in said
    assert "Traceback" not in said


def classify_by_handle(arguments: str) -> str:
    """What a script says that has the handle of a server and classifies something with it."""
    code = f"import tpray; print(tpray.connect({arguments}).classify.remote('a b').result())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_servers_never_answer_for_each_other(
    tmp_path: Path, free_port: Callable[[], int], make_checkpoint: Callable[..., Path], report: Report
) -> None:
    """The replica of one is killed; its port says nothing of the other's model, whose clients notice nothing."""
    first = start(free_port(), tmp_path, "--tp", "2")
    second = start(free_port(), tmp_path, str(make_checkpoint("bert", num_labels=5)))
    try:
        theirs = Clients(first.url, BODY, is_right, count=4)
        others = Clients(second.url, {"inputs": "a b c"}, lambda answer: len(answer) == 5, count=2)
        theirs.wait_for_answers()
        others.wait_for_answers()
        os.kill(process_of(first, "ray::ServeReplica"), signal.SIGKILL)
        theirs.wait_for_answers()
        tally, other = theirs.stop(), others.stop()
        report("replica killed, another server on the machine", tally)
        assert not tally.wrong
        assert not tally.lost, tally
        assert other.right == other.sent
        unnamed = classify_by_handle("")
        assert "servers run on this machine" in unnamed
        assert first.url in unnamed
        assert second.url in unnamed
        assert "'LABEL_4'" in classify_by_handle(f"url={second.url!r}")
        assert "'paraphrase'" in classify_by_handle(f"url={first.url!r}")
    finally:
        for server in (first, second):
            server.process.send_signal(signal.SIGINT)
        for server in (first, second):
            server.process.wait(60)


@pytest.mark.parametrize(
    ("variables", "limits", "words"),
    [
        ({"TPRAY_CACHE": "/proc/nothing"}, "", "cannot hold traced models"),
        ({"TPRAY_CACHE": "/dev/null"}, "", "cannot hold traced models"),
        ({"RAY_TMPDIR": "/proc/nothing"}, "", "Ray cannot write to its folder"),
        ({"RAY_TMPDIR": "/tmp/" + "x" * 80}, "", "too long for a socket"),
        ({"HOME": "/proc/nothing"}, "", "No such file or directory: '/proc/nothing'; set HOME to a folder"),
        ({}, "ulimit -Sn 500 && ulimit -Hn 500 &&", "this process may open 500 files and Ray needs 1024"),
    ],
)
def test_what_the_machine_lacks_is_said_before_ray_is_started(
    variables: dict[str, str], limits: str, words: str, free_port: Callable[[], int]
) -> None:
    command = f"{limits} exec {sys.executable} -m tpray serve --port {free_port()}"
    environ = os.environ | {"COLUMNS": "300"} | variables
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, env=environ)
    assert done.returncode == 2, done.stderr
    *spans, said = done.stderr.strip().splitlines()
    assert said.startswith("tpray: ")
    assert words in said
    names = [line.split()[0] for line in spans]
    assert set(names) <= {"import", "choose", "find"}, "before anything is started"
