"""End to end: the command, real Ray, real Serve, real HTTP, the demo model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray._common.utils import get_default_ray_temp_dir

from tests import sockets
from tests.served import Running, assert_all_gone, children_of, processes_of, sessions_of, start
from tpray.platforms import lease
from tpray.platforms.cores import core_count
from tpray.serving import live

pytestmark = pytest.mark.ray

PLACE = "The company HuggingFace is based in New York City"
FOOD = "Apples are especially bad for your health"
OFFICE = "HuggingFace's headquarters are situated in Manhattan"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Running]:
    running = start(free_port(), tmp_path_factory.mktemp("server"), "--tp", "2")
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGINT)
        running.process.wait(60)


def test_the_tutorials_pairs(server: Running) -> None:
    answer = server.predict({"inputs": [[PLACE, OFFICE], [PLACE, FOOD], [OFFICE, FOOD]]})
    assert [item[0]["label"] for item in answer.json()] == ["paraphrase", "not_paraphrase", "not_paraphrase"]
    assert int(answer.headers["x-compute-tokens"]) > 10
    single = server.predict({"inputs": [PLACE, OFFICE]}).json()
    assert [s["label"] for s in single] == ["paraphrase", "not_paraphrase"]
    assert sum(s["score"] for s in single) == pytest.approx(1.0)
    raw = server.predict({"inputs": [PLACE, OFFICE], "raw_scores": True}).json()
    assert raw[0]["score"] > 1.0


def test_every_socket_is_one_that_the_security_page_names(server: Running) -> None:
    pid, port = server.process.pid, int(server.url.rpartition(":")[2])
    found = sockets.listening(pid)
    assert {each.address for each in found if each.kind != "unix"} == {"127.0.0.1"}
    assert not [each for each in found if each.kind == "udp"]
    assert {each.process for each in found} >= {"haproxy", "ServeReplica", "raylet", "WorkerHost", "the command"}
    assert sockets.undeclared(pid, "serve", port=port) == []


def test_the_demo_ranks(server: Running) -> None:
    """Of its two labels the second is the relevant one."""
    body = {"query": PLACE, "texts": [FOOD, OFFICE] * 100}
    ranked = httpx.post(f"{server.url}/rerank", json=body, timeout=60).json()
    assert [each["index"] for each in ranked] == [*range(1, 200, 2), *range(0, 200, 2)]
    assert ranked[0]["score"] > 0.5 > ranked[-1]["score"]


def test_service_routes(server: Running) -> None:
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    info = server.info()
    assert (info["tp_degree"], info["labels"]) == (2, ["not_paraphrase", "paraphrase"])
    assert info["restarts"] == 0
    spans = {p["phase"] for p in info["startup"]}
    assert spans > {"import", "find", "Ray", "Serve", "replica", "resolve", "load", "check", "warm up", "tokenizer"}
    for path, assets in (("/", 3), ("/docs", 4)):
        found = re.findall(r"(?:src|href)=\"([^\"]+\.\w+)\"", httpx.get(f"{server.url}{path}").text)
        assert len(found) == assets
        assert {httpx.get(f"{server.url}/{asset}").status_code for asset in found} == {200}
    assert "/predict" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


def test_only_the_ranks_import_torch_on_a_first_start(server: Running) -> None:
    """They trace, and look at the model for the others."""
    (replica,) = processes_of(server, "ServeReplica")
    ranks = [rank["pid"] for rank in server.info()["ranks"]]
    holds = {
        pid: "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, replica, *ranks)
    }
    assert [pid for pid, torch in holds.items() if torch] == ranks
    assert {"trace", "describe"} <= {p["phase"] for p in server.info()["startup"]}


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 422, "Validation"),
        (b'{"inputs": 1}', 422, "Validation"),
        (b'{"inputs": ""}', 400, "Empty"),
        (b'{"inputs": []}', 400, "Empty"),
        (b'{"inputs": "a\\u0000b"}', 422, "Validation"),
        (b'{"inputs": "\\ud800"}', 422, "Validation"),
        (b'{"inputs": [' + b'["a"],' * 40 + b'["a"]]}', 413, "Validation"),
        (b'{"truncate": false, "inputs": "' + b"word " * 300 + b'"}', 422, "Validation"),
        (b'{"inputs": "' + b"x" * 2_000_000 + b'"}', 413, "Validation"),
    ],
)
def test_bad_input_is_refused_and_the_server_goes_on(server: Running, body: bytes, status: int, kind: str) -> None:
    answer = httpx.post(f"{server.url}/predict", content=body, timeout=60)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert answer.json()["error"]
    assert server.predict({"inputs": "still there"}).status_code == 200


def test_too_long_is_cut(server: Running) -> None:
    assert server.predict({"inputs": "word " * 300}).status_code == 200


def test_paths_of_other_dialects_come_through_haproxy(server: Running) -> None:
    for method, path in (("POST", "/"), ("POST", "/models/me/mine"), ("POST", "/predict/"), ("HEAD", "/ping")):
        answer = httpx.request(method, f"{server.url}{path}", json={"inputs": "a text"})
        assert answer.status_code == 200, (path, answer.text)


def test_many_clients_get_their_own_answers(server: Running) -> None:
    bodies = [{"inputs": [PLACE, OFFICE] if i % 2 else [PLACE, FOOD]} for i in range(60)]
    with ThreadPoolExecutor(16) as pool:
        labels = [a.json()[0]["label"] for a in pool.map(server.predict, bodies)]
    assert labels == ["paraphrase" if i % 2 else "not_paraphrase" for i in range(60)]


def test_a_handle_from_another_process(server: Running) -> None:
    """Also where a Ray that was killed has left its address, as `ray start` notes it."""
    noted = Path(get_default_ray_temp_dir(), "ray_current_cluster")
    noted.write_text("127.0.0.1:1")
    code = (
        "import tpray\nhandle = tpray.connect()\n"
        f"print(handle.classify.remote([({PLACE!r}, {OFFICE!r}), 'one text']).result())\n"
        f"print([r['index'] for r in handle.rerank.remote({PLACE!r}, [{FOOD!r}, {OFFICE!r}]).result()])\n"
        "long, mean = 'a firm ' * 200, {'aggregate': 'mean'}\n"
        "print('chunks', len(handle.classify.remote(long, chunks=mean).result()),\n"
        "      len(handle.rerank.remote('a', ['b', long], chunks=True).result()))\n"
        "try:\n    handle.classify.remote(['a', '']).result()\n"
        "except tpray.errors.EmptyInputError as e:\n    print(e, e.__cause__, e.__suppress_context__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    noted.unlink()
    assert "paraphrase" in done.stdout, done.stderr
    assert done.stdout.count("not_paraphrase") == 2
    assert "[1, 0]" in done.stdout, done.stderr
    assert "chunks 2 2" in done.stdout, done.stderr
    assert "item 1 is empty: send some text None True" in done.stdout, "the error itself, and not Ray's of it"
    assert done.stderr == ""


def test_the_readmes_examples(server: Running) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    # One stands for tests/trace/tutorial.txt, tests/clients runs those of clients, and tests/data those of Ray Data.
    others = ("MyModel", "client", "map_batches", "ray.data")
    runnable = [block for block in blocks if not any(word in block for word in others)]
    assert len(runnable) == 2
    for block in runnable:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=180, check=False)
        assert "label" in done.stdout, done.stderr
    answers = []
    for curl in re.findall(r"^curl .*$", readme, re.MULTILINE):
        command = curl.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
        answers.append(json.loads(done.stdout))
    predicted, ranked, refused = answers
    assert [item[0]["label"] for item in predicted] == ["paraphrase", "not_paraphrase"]
    assert [each["index"] for each in ranked] == [1, 0]
    assert "labels texts" in refused["error"], "the demo has no labels of tokens"


def test_a_killed_rank_costs_no_request(server: Running) -> None:
    """The group is rebuilt; requests in flight and those that come meanwhile are answered."""
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.predict, {"inputs": [PLACE, OFFICE]}) for _ in range(20)]
        os.kill(server.info()["ranks"][1]["pid"], signal.SIGKILL)
        waiting += [pool.submit(server.predict, {"inputs": [PLACE, OFFICE]}) for _ in range(20)]
        assert {w.result().status_code for w in waiting} == {200}
    assert server.info()["restarts"] == 1
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_a_second_server_on_the_port_is_refused(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "tpray", "serve", "--port", port],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_nothing_and_the_next_start_traces_nothing(server: Running, free_port: Callable[[], int]) -> None:
    family = children_of(server.process.pid)
    assert len(family) > 5
    assert sessions_of(server.process.pid, server.started)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.log.read_text()
    assert_all_gone(family, within_s=1)
    assert not sessions_of(server.process.pid, server.started)
    assert "Traceback" not in server.log.read_text()

    again = start(free_port(), server.log.parent, "--tp", "2")
    assert "traced before" in again.log.read_text()
    info = again.info()
    assert not info["traced_now"]
    pinned = [tuple(rank["cores"]) for rank in info["ranks"]]
    family = children_of(again.process.pid)
    again.process.kill()  # nobody is left to clean up but the watchdog
    again.process.wait(10)
    assert_all_gone(family, within_s=10)
    (session,) = sessions_of(again.process.pid, again.started)
    assert not (session / "sockets").exists()
    assert (session / "logs").is_dir()  # what happened before is worth keeping
    for cores in pinned:
        taken = lease.take_cores([cores])
        assert taken is not None
        taken.release()


def slow(*values: float) -> Any:
    """Parameters of a test that `make test` leaves to `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.nightly
def test_a_stream_of_the_group_passes_haproxy_and_ends_with_the_server(
    free_port: Callable[[], int], tmp_path: Path
) -> None:
    """Once a second, to its end; and a server that stops does not wait for it."""
    server = start(free_port(), tmp_path, "--tp", "2", "--drain-timeout", "60")
    with httpx.stream("GET", f"{server.url}{live.PATH}", timeout=10) as stream:
        assert sum(line == "event: load" for line in stream.iter_lines()) > live.STREAM_S / 2
    began = time.monotonic()
    with httpx.stream("GET", f"{server.url}{live.PATH}", timeout=10) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: info"
        server.process.send_signal(signal.SIGINT)
        assert "event: load" in list(lines)
    assert time.monotonic() - began < live.STREAM_S / 2
    assert server.process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(core_count() < 2, reason="on one core there is one group")
def test_for_throughput_there_are_several_groups(free_port: Callable[[], int], tmp_path: Path) -> None:
    running = start(free_port(), tmp_path, "--for", "throughput")
    log = running.log.read_text()
    chosen = re.search(r"choose .* (\d+) groups of tp 1 on .* for throughput", log)
    assert chosen is not None, log
    count = chosen[1]
    assert f"Ready the embedded demo, {count} groups of tp 1, at {running.url}" in log
    assert re.search(rf"groups .* all {count}\n +HAProxy", log), "what they took is not HAProxy's"
    assert {running.predict({"inputs": [PLACE, OFFICE]}).status_code for _ in range(8)} == {200}
    assert running.info()["chosen"].startswith(f"{count} groups")
    family = children_of(running.process.pid)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) == 0, running.log.read_text()
    assert_all_gone(family, within_s=1)


@pytest.mark.parametrize(("delay_s", "times"), [(0.5, 1), (2.0, 1), slow(4.0, 1), slow(6.0, 1), (6.0, 2)])
def test_an_interrupted_start_leaves_nothing(
    delay_s: float, times: int, free_port: Callable[[], int], tmp_path: Path
) -> None:
    """Whoever is impatient and interrupts twice does not wait for the end of the others; they end all the same."""
    started = time.time()
    environ = os.environ | {"TPRAY_CACHE": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tpray", "serve", "--port", str(free_port()), "--tp", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ,
    )  # fmt: skip
    time.sleep(delay_s)
    family = children_of(process.pid)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 0, 130), (process.returncode, output)
    assert_all_gone(family, within_s=1 if times == 1 else 10)
    if times == 1:  # else Ray's logs may stay, as after a crash
        assert not sessions_of(process.pid, started)
    if process.returncode != -signal.SIGINT:  # the interpreter itself was still starting
        assert "Traceback" not in output
