"""A whole group on NeuronCores, through the stand-ins: HTTP, placement, a killed rank, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.neuron_standin import environment
from tpray.config import cache_dir
from tpray.platforms.lease import GROUP_PORTS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_cache")]
XLA = pytest.mark.xla
RUNTIMES = [pytest.param("neuron", marks=pytest.mark.nightly), pytest.param("neuron-xla", marks=XLA)]
TEXTS = [["a b c"], ["b", "c d"], ["f g h i j k"]]
BUCKETS = "1x16,4x16,4x48"


@contextmanager
def serving(environ: dict[str, str], *args: str) -> Iterator[str]:
    """A server that is up; it is stopped, and must stop cleanly, at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tpray", "serve", *args], env=os.environ | environ | {"TPRAY_LOG": "INFO"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    port = args[args.index("--port") + 1]
    too_long = threading.Timer(240, process.terminate)
    too_long.start()
    try:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("Ready"):
                break
        else:
            raise AssertionError("".join(seen))
        too_long.cancel()
        yield f"http://127.0.0.1:{port}"
    finally:
        too_long.cancel()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def scores(url: str) -> list[list[float]]:
    answer = httpx.post(f"{url}/predict", json={"inputs": TEXTS, "raw_scores": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    return [[p["score"] for p in sorted(row, key=lambda p: p["label"])] for row in answer.json()]


def stock_scores(checkpoint: Path) -> list[list[float]]:
    """What transformers answers to `TEXTS`, by label."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(*text, return_tensors="pt")).logits[0].tolist() for text in TEXTS]
    order = sorted(range(len(rows[0])), key=lambda i: model.config.id2label[i])
    return [[row[i] for i in order] for row in rows]


def run(environ: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpray", *args], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | environ | {"COLUMNS": "200"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("runtime", "layout"),
    [
        ("neuron", "process-per-rank"),
        pytest.param("neuron-xla", "process-per-rank", marks=XLA),
        pytest.param("neuron-xla", "single-process", marks=XLA),
    ],
)
def test_a_group_serves_http_and_is_rebuilt(
    runtime: str, layout: str, neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path],
    free_port: Callable[[], int],
) -> None:  # fmt: skip
    """The CPU runtime's logits, from ranks on neighbouring cores, before and after one of them is killed."""
    checkpoint = make_checkpoint()
    wanted = stock_scores(checkpoint)
    environ = environment(runtime, tmp_path, neuron_device)
    arguments = [
        str(checkpoint), "--tp", "2", "--dtype", "float32", "--runtime", runtime, "--neuron-layout", layout,
        "--buckets", BUCKETS, "--instance-family", "trn2", "--port", str(free_port()),
    ]  # fmt: skip
    with serving(environ, *arguments) as url:
        info = httpx.get(f"{url}/info", timeout=30).json()
        assert info["runtime"] == runtime
        assert [rank["cores"] for rank in info["ranks"]] == [[0], [1]]
        assert len({rank["pid"] for rank in info["ranks"]}) == (1 if layout == "single-process" else 2)
        for row, expected in zip(scores(url), wanted, strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
        too_long = httpx.post(f"{url}/predict", json={"inputs": "a " * 60, "truncate": False}, timeout=30)
        assert too_long.status_code == 422
        os.kill(info["ranks"][-1]["pid"], signal.SIGKILL)
        for row, expected in zip(scores(url), wanted, strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
        after = httpx.get(f"{url}/info", timeout=30).json()
        assert after["restarts"] == 1
        assert [rank["cores"] for rank in after["ranks"]] == [[0], [1]]
        assert {r["pid"] for r in after["ranks"]}.isdisjoint({r["pid"] for r in info["ranks"]})


@pytest.mark.slow
def test_traced_on_one_machine_and_served_by_two_groups_of_another(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path], free_port: Callable[[], int]
) -> None:
    """Nothing is compiled again; the groups have cores [0, 1] and [2, 3], and ports of their own."""
    environ = environment("neuron", tmp_path, neuron_device)
    out = tmp_path / "artifact"
    for port in GROUP_PORTS:  # what another group has left
        stale = cache_dir() / "neff" / f"group-{port}" / "stale.neff"
        stale.parent.mkdir(parents=True)
        stale.touch()
    common = ["--tp", "2", "--runtime", "neuron", "--instance-family", "trn2"]
    done = run(environ, "trace", str(make_checkpoint()), *common, "--buckets", "1x16,4x16", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "4 of 4 programs done; rank" in done.stderr, "it says how far it is"
    assert list((out / "rank_00" / "neff").iterdir())
    assert not list(out.rglob("stale.neff"))
    assert not list(out.rglob("*.lock"))
    assert list((cache_dir() / "neff").glob("locks-*/locks/*.lock")), "no group shares its locks with others"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["instance_family"] == "trn2"
    assert manifest["versions"]["torch-neuronx"] == "2.13.3.0"
    compiled = (tmp_path / "compiled").read_text()
    elsewhere = environ | {"TPRAY_CACHE": str(tmp_path / "other-machine")}
    with serving(elsewhere, str(out), *common, "--replicas", "2", "--port", str(free_port())) as url:
        found: set[tuple[int, ...]] = set()
        give_up = time.monotonic() + 60
        while len(found) < 2 and time.monotonic() < give_up:
            ranks = httpx.get(f"{url}/info", timeout=30).json()["ranks"]
            found.add(tuple(core for rank in ranks for core in rank["cores"]))
        assert found == {(0, 1), (2, 3)}
    assert (tmp_path / "compiled").read_text() == compiled


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_the_compiler_says_is_shown(
    runtime: str, neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    environ = environment(runtime, tmp_path, neuron_device) | {"NEURON_STANDIN_FAIL_COMPILE": "1"}
    done = run(
        environ, "classify", "a", "--model", str(make_checkpoint()), "--runtime", runtime, "--tp", "2",
        "--instance-family", "trn2",
    )  # fmt: skip
    assert done.returncode == 1
    assert "NCC_EVRF004" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
def test_a_program_that_fails_on_the_core_is_an_error(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """TorchNeuron by itself would run it on the CPU, and say so in a log."""
    environ = environment("neuron", tmp_path, neuron_device) | {"NEURON_STANDIN_FAIL_EXECUTION": "1"}
    done = run(environ, "classify", "a", "--model", str(make_checkpoint()), "--runtime", "neuron", "--tp", "2")
    assert done.returncode == 1
    assert "nrt_execute failed with 1" in done.stderr


@pytest.mark.nightly
def test_cores_that_are_taken_are_named(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    import fcntl

    with (tmp_path / "nc-1").open("w") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        environ = environment("neuron", tmp_path, neuron_device)
        done = run(environ, "classify", "a", "--model", str(make_checkpoint()), "--tp", "2", "--runtime", "neuron")
    assert done.returncode == 1
    assert "core" in done.stderr
    assert "4711" in done.stderr


@pytest.mark.nightly
def test_cores_that_are_freed_late_are_waited_for(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """As those of a killed process: refused ranks are ended, and new ones get the cores."""
    import fcntl

    environ = environment("neuron", tmp_path, neuron_device) | {"COLUMNS": "200"}
    with (tmp_path / "nc-1").open("w") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "tpray", "classify", "a", "--model", str(make_checkpoint()), "--tp", "2",
             "--runtime", "neuron", "--instance-family", "trn2"],
            env=os.environ | environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        too_long = threading.Timer(240, process.terminate)
        too_long.start()
        assert process.stderr is not None
        said = ""
        while "the NeuronCores are busy, and are tried again" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        fcntl.flock(held, fcntl.LOCK_UN)
        said += process.stderr.read()
        too_long.cancel()
    assert process.wait() == 0, said


LATE = """
import asyncio, sys
from pathlib import Path
import numpy as np
from tpray.config import ModelConfig, ParallelConfig
from tpray.errors import StepTimeoutError
from tpray.local_ray.local import start_ray, stop_ray
from tpray.group.classifier import ClassifierGroup
from tpray.platforms.topology import Topology
from tpray.group.ray_executor import RayExecutor

async def main(checkpoint, runtime, claims):
    parallel = ParallelConfig(tp=2, runtime=runtime, instance_family="trn2")
    model = ModelConfig(source=checkpoint, dtype="float32", buckets=((1, 16),))
    group = ClassifierGroup(model, RayExecutor(Topology.of(parallel)), step_timeout_s=4)
    await group.start()
    ids = np.full((1, 5), 7)
    inputs = [ids, np.ones_like(ids), np.zeros_like(ids)]
    before = (await group.step(inputs)).logits.copy()
    Path(claims, "hang").touch()
    try:
        await group.step(inputs)
    except StepTimeoutError as e:
        print(e)
    await group.lifecycle.until_ready()
    assert (before == (await group.step(inputs)).logits).all()
    print([info.cores for info in group.workers])
    await group.stop()

start_ray(4)
try:
    asyncio.run(main(*sys.argv[1:]))
finally:
    stop_ray()
"""


@pytest.mark.nightly
def test_a_step_past_its_deadline_ends_the_group_which_is_rebuilt_on_its_cores(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """Rank 1 never enters a collective, so that rank 0 waits in it."""
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(make_checkpoint()), "neuron", str(tmp_path)], timeout=240, check=False,
        env=os.environ | environment("neuron", tmp_path, neuron_device), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    late, cores = done.stdout.splitlines()
    assert late.startswith("a step was not answered by rank 0, 1 within 4")
    assert cores == "[(0,), (1,)]"


LAYOUTS = """
import asyncio, json, sys
import numpy as np
from tpray.config import ModelConfig, ParallelConfig
from tpray.local_ray.local import start_ray, stop_ray
from tpray.group.attempts import TRIAL_S
from tpray.group.classifier import ClassifierGroup
from tpray.platforms.topology import Topology
from tpray.group.ray_executor import RayExecutor

TRIAL_S["load"] = 10.0

async def main(checkpoint):
    topology = Topology.of(ParallelConfig(tp=2, runtime="neuron-xla", instance_family="trn2"))
    model = ModelConfig(source=checkpoint, dtype="float32", buckets=((1, 16),))
    group = ClassifierGroup(model, RayExecutor(topology))
    await group.start()
    ids = np.full((1, 5), 7)
    await group.step([ids, np.ones_like(ids), np.zeros_like(ids)])
    cores, processes = [info.cores for info in group.workers], len({info.pid for info in group.workers})
    print("found", json.dumps([group.layout_failure, cores, processes]))
    await group.stop()

start_ray(4)
try:
    asyncio.run(main(sys.argv[1]))
finally:
    stop_ray()
"""


@XLA
def test_a_machine_without_cores_traces_for_those_that_have_them(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    environ = environment("neuron-xla", tmp_path, neuron_device)
    cores = environ.pop("RAY_OVERRIDE_RESOURCES")
    traced = ["trace", str(make_checkpoint()), "--tp", "2", "--runtime", "neuron-xla", "--dtype", "float32"]
    unnamed = run(environ, *traced, "--buckets", "1x16")
    assert unnamed.returncode == 2
    assert "name it with --instance-family inf2, trn1 or trn2" in unnamed.stderr
    out = tmp_path / "artifact"
    done = run(environ, *traced, "--buckets", "1x16", "--instance-family", "trn1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "There are no cores here to check it on" in done.stderr
    assert not list(tmp_path.glob("nc-*")), "no core was taken"
    there = environ | {"RAY_OVERRIDE_RESOURCES": cores}
    arguments = ["--tp", "2", "--runtime", "neuron-xla", "--instance-family", "trn1"]
    answered = run(there, "classify", TEXTS[0][0], "--model", str(out), *arguments)
    assert answered.returncode == 0, answered.stderr


@XLA
@pytest.mark.parametrize(
    ("way", "words"), [("exit", "died"), ("hang", "start-up phase 7 (load) did not finish within 10 s")]
)
def test_ranks_that_die_or_hang_in_loading_give_their_cores_to_one_process(
    way: str, words: str, neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    environ = environment("neuron-xla", tmp_path, neuron_device) | {"NEURON_STANDIN_PROCESS_PER_RANK": way}
    done = subprocess.run(
        [sys.executable, "-c", LAYOUTS, str(make_checkpoint())], timeout=240, check=False,
        env=os.environ | environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]  # Ray writes there, too
    failure, *rest = json.loads(found.removeprefix("found "))
    assert failure.startswith("process-per-rank failed in the phase load: ")
    assert words in failure
    assert "the group goes on with single-process" in done.stderr
    assert rest == [[[0], [1]], 1]


@XLA
def test_a_server_says_which_layout_runs_and_why(
    neuron_device: Path, tmp_path: Path, make_checkpoint: Callable[..., Path], free_port: Callable[[], int]
) -> None:
    """In a Serve replica, whose placement group both layouts share; a restart does not try the first one again."""
    environ = environment("neuron-xla", tmp_path, neuron_device) | {"NEURON_STANDIN_PROCESS_PER_RANK": "raise"}
    arguments = [
        str(make_checkpoint()), "--tp", "2", "--runtime", "neuron-xla", "--buckets", "1x16",
        "--instance-family", "trn2", "--port", str(free_port()),
    ]  # fmt: skip
    with serving(environ, *arguments) as url:
        info = httpx.get(f"{url}/info", timeout=30).json()
        assert info["layout"] == "single-process"
        assert info["layout_failure"].startswith("process-per-rank failed in the phase load: ")
        assert "nrt_load_collectives status=2" in info["layout_failure"]
        assert [phase["phase"] for phase in info["startup"]].count("load") == 2
        said = run(environ, "status", url)
        assert "single-process (process-per-rank failed in the phase load: " in " ".join(said.stdout.split())
        os.kill(info["ranks"][0]["pid"], signal.SIGKILL)
        assert httpx.post(f"{url}/predict", json={"inputs": "a b"}, timeout=60).status_code == 200
        after = httpx.get(f"{url}/info", timeout=30).json()
        assert (after["restarts"], after["layout"], after["layout_failure"]) == (
            1, "single-process", info["layout_failure"],
        )  # fmt: skip


OWN = """
import sys
import torch, tpray.trace
from torch import nn
from tpray.local_ray.local import start_ray, stop_ray
from tpray.platforms.topology import Topology
from tpray.group.ray_executor import RayExecutor
from tpray.parallel_layers import collective, layers, parallel_state

class FromRank1(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.full((8,), 3.0 + parallel_state.get_tensor_model_parallel_rank()))

    def forward(self, x):
        return x + collective.broadcast(self.own, 1)

def get_model():
    up = layers.ColumnParallelLinear(8, 16, gather_output=False)
    down = layers.RowParallelLinear(16, 8, input_is_parallel=True)
    for parameter in (*up.parameters(), *down.parameters()):
        nn.init.constant_(parameter, 0.1)
    return nn.Sequential(up, nn.ReLU(), down, FromRank1()), {}

start_ray(4)
try:
    on_cores = lambda tp: RayExecutor(Topology(tp, sys.argv[1], instance_family="trn2"))
    model = tpray.trace.parallel_model_trace(get_model, (torch.ones(1, 8),), tp_degree=2, executor=on_cores)
    print(*model(torch.ones(1, 8))[0].flatten().tolist())
    model.close()
finally:
    stop_ray()
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_of_ones_own_is_traced_and_run(runtime: str, neuron_device: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWN, runtime], env=os.environ | environment(runtime, tmp_path, neuron_device),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = 16 * 0.1 * (8 * 0.1 + 0.1) + 0.1 + 4
    assert list(map(float, done.stdout.split())) == pytest.approx([wanted] * 8, abs=1e-5)


@pytest.mark.parametrize(
    ("runtime", "tests", "reported", "part"),
    [
        pytest.param("neuron", "2-float32", "parity tp 2 float32", {"cores": [[0], [1]]}, marks=pytest.mark.nightly),
        pytest.param("neuron-xla", "kill", "cores are free after kill -9", {"tp": 2}, marks=XLA),
    ],
)
def test_the_device_suite_runs(
    runtime: str, tests: str, reported: str, part: dict[str, Any], neuron_device: Path, tmp_path: Path
) -> None:
    """What a person with hardware runs passes on the stand-ins, and writes its report."""
    environ = environment(runtime, tmp_path, neuron_device) | {"TPRAY_TEST_RUNTIME": runtime, "TPRAY_TEST_CORES": "2"}
    environ |= {"TPRAY_TEST_FAMILY": "trn2"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", str(root), "-c", str(root / "pyproject.toml"),
         str(root / "tests" / "device"), "-k", tests],
        env=os.environ | environ, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "neuron-report.json").read_text())
    assert report[reported] | part == report[reported]
    assert set(report["outcomes"].values()) == {"passed"}
