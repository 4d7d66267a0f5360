"""Bodies that are made to cost much: whoever sends them is answered or refused, and nobody else waits for it."""

from __future__ import annotations

import gzip
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tpray.config import environment

ROOT = Path(__file__).parents[2]
MB = 1 << 20


class Server:
    """The process of `tests.faults.http_server`, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def ask(self, body: bytes, encoding: str = "identity", timeout_s: float = 30) -> tuple[int, bytes]:
        """Status and body of the answer to ``POST /predict``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            headers = {"content-type": "application/json", "content-encoding": encoding}
            connection.request("POST", "/predict", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask_or_be_cut_off(self, body: bytes) -> int:
        """The status of the answer; 0 if the server closed the connection while the body was still being sent."""
        try:
            return self.ask(body)[0]
        except (ConnectionError, http.client.HTTPException):
            return 0

    def send(self, data: bytes) -> None:
        """Send something and go away."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(data)

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes resident now, or at most so far (``VmHWM``)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024

    def forget_peak(self) -> None:
        """Have ``VmHWM`` count from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @contextmanager
    def bounded(self, wait_s: float = 1.0, growth: int = 500 * MB) -> Iterator[None]:
        """Neighbours with small requests are answered in the block, and the process grows by less than ``growth``.

        How long they wait at most is printed; that it is less than ``wait_s`` is a promise for an idle machine, and a
        test only fails at ten times that.
        """
        waits: list[float] = []
        over = threading.Event()

        def neighbour() -> None:
            while not over.is_set():
                started = time.monotonic()
                assert self.ask(b'{"inputs": "a small text"}')[0] == 200
                waits.append(time.monotonic() - started)
                time.sleep(0.01)

        self.forget_peak()
        before = self.memory()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(neighbour)
            while not waits and not asking.done():
                time.sleep(0.005)
            try:
                yield
            finally:
                over.set()
            asking.result()
        print(f"a neighbour waited {max(waits):.2f} s at most, of {wait_s:g}")
        assert max(waits) < 10 * wait_s
        assert self.memory("VmHWM") - before < growth


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A function that starts a server with limits of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(**limits: float) -> Server:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.http_server", *(f"{name}={value}" for name, value in limits.items())],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        server = Server(process, int(process.stdout.readline()))
        assert server.ask(b'{"inputs": "a"}')[0] == 200
        return server

    yield start
    for process in started:
        process.kill()
        process.wait()


def body(inputs: object, **options: object) -> bytes:
    return json.dumps({"inputs": inputs, **options}, ensure_ascii=False).encode()


WORDS = "a " * 24_000
MUCH = 1_900_000
CUT = {"truncate": True}
BODIES: dict[str, tuple[bytes, int, str]] = {
    "a pair of which much is cut": (body([WORDS, WORDS], **CUT), 200, ""),
    "the same from the left": (body([WORDS, WORDS], **CUT, truncation_direction="Left"), 200, ""),
    "a pair too long": (body([WORDS, WORDS], truncate=False), 422, "more than 128 tokens"),
    "pairs of all that is allowed": (body([["a " * 14_000, "b " * 14_000]] * 32, **CUT), 200, ""),
    "marks": (body("!" * MUCH, truncate=False), 422, "more than 128 tokens"),
    "marks, cut": (body("!" * MUCH, **CUT), 200, ""),
    "two texts of marks, cut": (body(["!" * (MUCH // 2), "?" * (MUCH // 2)], **CUT), 200, ""),
    "one word": (body("a" * MUCH), 200, ""),
    "one word, cut": (body("a" * MUCH, **CUT), 200, ""),
    "words without an end": (body("ab " * (MUCH // 3), truncate=False), 422, "more than 128 tokens"),
    "spaces between two words": (body("a" + " " * MUCH + "b"), 200, ""),
    "Chinese": (body("你好" * (MUCH // 6), **CUT), 200, ""),
    "marks above a letter": (body("a" + "\u0301" * (MUCH // 2)), 200, ""),
    "emoji": (body("🙂" * (MUCH // 4), **CUT), 200, ""),
    "a special token again and again": (body("[SEP]" * (MUCH // 5), **CUT), 200, ""),
    "numbers for texts": (b'{"inputs": [' + b"1," * (MUCH // 2) + b"1]}", 413, "too many values"),
    "empty lists": (b'{"inputs": [' + b"[]," * (MUCH // 3) + b"[]]}", 413, "too many values"),
    "many tiny items": (body([["a"]] * (MUCH // 7)), 413, "too many values"),
    "a few items too many": (body([["a"]] * 33), 413, "has 33 items and the limit is 32"),
    "many keys": (b"{" + b",".join(b'"%d":1' % i for i in range(MUCH // 11)) + b"}", 413, "too many values"),
    "a key of many letters": (b'{"inputs": "a", "' + b"k" * MUCH + b'": 1}', 422, "is not known here"),
    "deep lists": (b'{"inputs": ' + b"[" * MUCH, 413, "too many values"),
    "less deep lists": (b'{"inputs": ' + b"[" * 1000, 422, "not valid JSON: recursion limit"),
    "a number of many digits": (b'{"inputs": ' + b"1" * MUCH + b"}", 422, "not valid JSON: number out of range"),
    "escapes": (b'{"inputs": "' + b"\\u0000" * 300_000 + b'"}', 422, "NUL character at position 0"),
    "escaped quotes": (b'{"inputs": "' + b'\\"' * (MUCH // 2) + b'", "truncate": true}', 200, ""),
    "half of a pair": (b'{"inputs": "\\ud800"}', 422, "not valid JSON"),
    "a direction that is none": (body("a", truncation_direction="U" * MUCH), 422, "`truncation_direction`"),
    "not JSON": (b"!" * MUCH, 422, "not valid JSON"),
    "not UTF-8": (b'{"inputs": "' + b"\xff" * MUCH + b'"}', 422, "not valid JSON"),
    "too large": (b" " * 2_000_001, 413, "larger than 2000000 bytes"),
}  # fmt: skip
"""Body, status and words of the answer."""


def test_no_body_makes_others_wait_or_fills_the_memory(start_server: Callable[..., Server]) -> None:
    server = start_server()
    server.ask(body("a " * 5000, **CUT))
    slow = {}
    for name, (sent, status, words) in BODIES.items():
        started = time.monotonic()
        with server.bounded():
            found, answer = server.ask(sent)
        slow[name] = time.monotonic() - started
        print(f"{name}: {found}, {slow[name]:.2f} s, {server.memory('VmHWM') // MB} MB")
        assert found == status, (name, answer[:300])
        assert words in answer.decode(), name
        assert len(answer) < 4000, name
    assert max(slow.values()) < 5, slow


def test_bodies_are_bounded_together(start_server: Callable[..., Server]) -> None:
    """Half a gigabyte is sent at once; what is not refused is answered."""
    server = start_server()
    sent = body("spaces" + " " * MUCH)
    with server.bounded(wait_s=3), ThreadPoolExecutor(128) as pool:
        statuses = list(pool.map(lambda _: server.ask_or_be_cut_off(sent), range(256)))
    assert set(statuses) <= {200, 429, 0}
    assert 200 in statuses


def test_what_is_held_is_given_back(start_server: Callable[..., Server]) -> None:
    server = start_server()
    for _ in range(20):  # more than may be held at once
        assert server.ask(body("!" * MUCH, truncate=False))[0] == 422
        server.send(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1900000\r\n\r\n" + b" " * (MUCH // 2))
    deadline = time.monotonic() + 5
    while (status := server.ask(body("a" + " " * MUCH))[0]) == 429 and time.monotonic() < deadline:
        time.sleep(0.05)  # that clients left is noticed soon, not at once
    assert status == 200


def test_a_body_that_does_not_come_is_not_waited_for(start_server: Callable[..., Server]) -> None:
    server = start_server(request_timeout_s=1)
    with server.bounded():
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{")
            answer = slow.makefile("rb").read()
        assert b"504" in answer.splitlines()[0]
        assert b"was not answered within 1 s" in answer


def test_compressed_bodies_are_refused_as_they_are(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with server.bounded(growth=50 * MB):
        status, answer = server.ask(gzip.compress(b" " * 100 * MB), "gzip")
    assert status == 422
    assert b"Content-Encoding" in answer


def random_body(rng: random.Random) -> bytes:
    """A body of the form with values that need not be, or one of them damaged."""
    texts: list[Callable[[], object]] = [
        lambda: rng.choice(["a", "!", " ", "你好", "🙂", "[SEP] ", "\u0301", "a b ", "\n"]) * rng.randrange(1, 3000),
        lambda: "".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(32, 127)])) for _ in range(50)),
        lambda: rng.choice(["", " ", "\0", "a\0", "\ud800", None, 1, -0.5, True, [], {}, 10**40, float("nan"), "Up"]),
    ]  # fmt: skip

    def one() -> object:
        return rng.choice(texts)()

    forms: list[Callable[[], object]] = [
        one,
        lambda: [one()],
        lambda: [one(), one()],
        lambda: [[one()] for _ in range(rng.randrange(40))],
        lambda: [[one(), one()] for _ in range(rng.randrange(8))],
        lambda: [one(), [one()]],
        lambda: {"a": one()},
    ]
    inputs = rng.choice(forms)()
    options = {
        name: value()
        for name, value in {
            "truncate": lambda: rng.choice([True, True, False, "yes", one()]),
            "truncation_direction": lambda: rng.choice(["Left", "Right", one()]),
            "raw_scores": lambda: rng.choice([True, 0, one()]),
            rng.choice("xyz"): one,
        }.items()
        if rng.random() < 0.4
    }
    made = json.dumps({"inputs": inputs, **options}, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        place = rng.randrange(len(made) + 1)
        made = rng.choice([made[:place], made[:place] + rng.randbytes(3) + made[place:], made + made])
    return made


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_whatever_the_body_it_is_answered_or_refused(count: int, start_server: Callable[..., Server]) -> None:
    server, rng = start_server(), random.Random(count)
    with server.bounded(growth=150 * MB):
        for number in range(count):
            sent = random_body(rng)
            status, answer = server.ask(sent)
            assert status in (200, 400, 413, 422, 503, 504), (number, sent[:500], answer)
            assert status == 200 or set(json.loads(answer)) == {"error", "error_type"}
            assert status == 200 or len(answer) < 1000, (number, answer)
