"""A group of Ray actors without Serve, and the commands that use one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import tpray
from tests import sockets
from tpray.artifacts.resolve import find_model
from tpray.commands.cli import main
from tpray.config import ModelConfig
from tpray.errors import ConfigError, DegreeError
from tpray.platforms.topology import Topology

pytestmark = pytest.mark.ray


def run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpray", *args], capture_output=True, text=True, timeout=180, check=False, input=stdin,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip


Refused = Callable[..., tuple[object, str]]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that runs a command in this process, and gives its exit code and what it said."""

    def command(*args: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["tpray", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return command


def test_load_classifies_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every process logs what TPRAY_LOG asks for: the ranks', in Ray's files."""
    monkeypatch.setenv("TPRAY_LOG", "INFO")
    with tpray.load(tp=2, dtype="float32") as classifier:
        assert sockets.undeclared(os.getpid(), "load") == []
        node: Any = ray._private.worker._global_node  # to a checker None: Ray annotates it nowhere
        logs = Path(node.get_session_dir_path()) / "logs"
        said = "".join(file.read_text() for file in logs.glob("worker-*.err"))
        for rank in range(2):
            assert f"INFO tpray.runtime.cpu.runtime: rank {rank} loaded" in said
        pids = [info.pid for info in classifier.group.workers]
        best = classifier.classify(("The firm is in Paris", "The firm is in Paris"))[0]
        assert best["label"] == "paraphrase"
        assert len(classifier.classify(["a b"] * 100)) == 100
        ids = [[2, 8, 9, 3]]
        assert classifier.logits(input_ids=ids).shape == (1, 2)
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_a_jsonl_file_in_and_out(tmp_path: Path) -> None:
    """Every line comes back, in order, with its own keys; a bad one says why."""
    lines = [
        '{"id": 1, "text": "The train leaves at nine", "text_pair": "The train leaves at ten"}',
        "not json",
        '{"id": 3, "text": ""}',
        '{"id": 4, "text": "caf\\u00e9"}',
        '{"id": 5}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    done = run("classify", "--in", str(source), "--out", str(target))
    assert done.returncode == 1, done.stderr
    assert "2 classified, 3 refused" in done.stderr
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r.get("id") for r in records] == [1, None, 3, 4, 5]
    assert ["error" in r for r in records] == [False, True, True, False, True]
    assert records[0]["label"] == "not_paraphrase"
    assert "line 3 is empty" in records[2]["error"]


def test_trace_then_classify_from_the_artifact(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    out = tmp_path / "artifact"
    done = run("trace", str(make_checkpoint()), "--tp", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    again = run("trace", str(make_checkpoint()), "--tp", "2", "--out", str(out))
    assert again.returncode == 2
    assert "--force" in again.stderr
    used = run("classify", "a b c", "--model", str(out), "--tp", "2", "--json")
    assert used.returncode == 0, used.stderr
    assert len(json.loads(used.stdout)["scores"]) == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["classify", "a", "--model", "./absent"], "there is no directory ./absent"),
        (["classify", "a", "--model", "/etc"], "no config.json"),
        (["classify", "a", "--tp", "9"], "use 1 to 4 ranks"),
        (["classify", "a", "--runtime", "neuron"], "NeuronCores on one node, and no node of this Ray has more"),
        (["classify"], "name texts to classify"),
        (["classify", "a", "--pair"], "exactly two texts"),
        (["classify", "a", "--out", "b"], "--in"),
        (["doctor", "--tp", "2"], "are of a model"),
        (["status", "http://127.0.0.1:1/"], "at http://127.0.0.1:1: Connection refused; start one"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(args: list[str], words: str, refused: Refused) -> None:
    code, said = refused(*args)
    assert code in (1, 2)
    assert words in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


def test_an_unsupported_architecture_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "reformer"}')
    code, said = refused("classify", "a", "--model", str(tmp_path))
    assert code == 2
    assert "'reformer'" in said
    assert "roberta" in said


def test_doctor_says_what_auto_chooses() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    for words in ("cores", "NUMA", "instructions", "memory", "torch", "model cache", "auto chooses"):
        assert words in done.stdout


def test_the_degree_is_checked_before_anything_starts(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(DegreeError):
        find_model(ModelConfig(source=str(make_checkpoint())), Topology(5))


def test_a_model_larger_than_memory_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpray.artifacts.sizes.available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"GiB and this machine has 0\.0 GiB"):
        find_model(ModelConfig(), Topology(1))
