"""What a start imports, what it remembers, and how its spans add up."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

import tpray
from tpray.artifacts.resolve import Remembered, locate, recall_or_find, resolve
from tpray.cache_files import KEPT_FILES, write_whole
from tpray.config import DEMO_DIR, ModelConfig, cache_dir, environment
from tpray.errors import DegreeError
from tpray.group.phases import PhaseReport, Spans, process_started
from tpray.group.worker_host import WorkerHost
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.platforms.topology import Topology
from tpray.serving import prepare
from tpray.serving.codec import TextCodec
from tpray.serving.engine import Engine
from tpray.serving.launch import _reason
from tpray.serving.progress import Receiver, Sender
from tpray.serving.tokenizer_facts import facts_path, read_facts

MakeCheckpoint = Callable[..., Path]
HEAVY = ("torch", "transformers")


def loaded_by(code: str, *names: str) -> list[str]:
    """Which of ``names`` a new process has imported when it has run ``code``."""
    said = f"{code}\nimport sys\nprint([name for name in {names!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True, env=environment())
    found: list[str] = eval(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("module", ["tpray.serving.launch", "tpray.serving.app", "tpray.serving.http"])
def test_the_command_and_the_replica_import_neither_torch_nor_transformers(module: str) -> None:
    assert loaded_by(f"import {module}", *HEAVY) == []


def test_to_choose_a_layout_the_command_needs_neither() -> None:
    code = "from tpray.config import ServeConfig as C; from tpray.artifacts.settle import settle; settle(C())"
    assert loaded_by(code, *HEAVY) == []


def test_the_command_line_imports_no_ray_until_it_needs_it() -> None:
    assert loaded_by("import tpray.commands.cli, tpray.serving.launch", "ray", *HEAVY) == []


def load(checkpoint: Path) -> None:
    tpray.load(checkpoint, in_process=True).close()


@pytest.mark.usefixtures("own_cache")
def test_the_second_start_asks_transformers_nothing(make_checkpoint: MakeCheckpoint) -> None:
    """Not for the model, and not for its tokenizer; its rank runs without transformers too."""
    load(make_checkpoint())
    code = f"import tpray\nwith tpray.load({str(make_checkpoint())!r}, in_process=True) as c: c.classify('a text')"
    forbidden = ("transformers", "ray", "torch._dynamo", "torch._inductor", "sympy", "torch._export.serde.serialize")
    assert loaded_by(code, *forbidden) == []
    found = recall_or_find(ModelConfig(source=str(make_checkpoint())), Topology(1))
    assert isinstance(found, Remembered)
    manifest = found.artifact.manifest
    facts = read_facts(facts_path(manifest.model_files, manifest.model.max_length))
    assert facts is not None
    fresh, known = (TextCodec(found.artifact.model_directory, manifest.model, each) for each in (None, facts))
    assert fresh.facts == facts
    long = ("many words of a text " * 40, "and of its pair " * 60)
    for direction in ("Left", "Right"):
        for item in ("Ça n'est pas vrai", ("a", "b"), long):
            made = [codec.encode([item], True, direction) for codec in (fresh, known)]
            assert made[0] == made[1]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_changed_is_looked_at_again(make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    """Though it has the same size, and the same time of its last change."""
    checkpoint = tmp_path / "model"
    shutil.copytree(make_checkpoint(), checkpoint)
    load(checkpoint)
    model = ModelConfig(source=str(checkpoint))
    assert isinstance(recall_or_find(model, Topology(1)), Remembered)
    before = (checkpoint / name).stat()
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes())
    subprocess.run(["touch", "-d", f"@{before.st_mtime_ns / 1e9:.9f}", str(checkpoint / name)], check=True)
    assert isinstance(recall_or_find(model, Topology(1)), Checkpoint)


@pytest.mark.usefixtures("own_cache")
def test_weights_that_lie_elsewhere_are_not_remembered(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Of files in other folders no note says whether they have changed."""
    copy = shutil.copytree(make_checkpoint(), tmp_path / "copy")
    (copy / "w").mkdir()
    (copy / "model.safetensors").rename(copy / "w" / "part.safetensors")
    with safe_open(copy / "w" / "part.safetensors", "pt") as file:
        names = dict.fromkeys(file.keys(), "w/part.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    load(copy)
    assert isinstance(recall_or_find(ModelConfig(source=str(copy)), Topology(1)), Checkpoint)


@pytest.mark.usefixtures("own_cache")
def test_other_settings_are_not_what_was_remembered(make_checkpoint: MakeCheckpoint) -> None:
    load(make_checkpoint())
    source = str(make_checkpoint())
    assert isinstance(recall_or_find(ModelConfig(source=source), Topology(1)), Remembered)
    assert isinstance(recall_or_find(ModelConfig(source=source), Topology(2)), Checkpoint)
    assert isinstance(recall_or_find(ModelConfig(source=source, buckets=((1, 8),)), Topology(1)), Checkpoint)


@pytest.mark.usefixtures("own_cache")
def test_a_remembered_artifact_that_is_damaged_is_traced_again(make_checkpoint: MakeCheckpoint) -> None:
    load(make_checkpoint())
    found = recall_or_find(ModelConfig(source=str(make_checkpoint())), Topology(1))
    assert isinstance(found, Remembered)
    weights = found.artifact.rank_directory(0) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with tpray.load(make_checkpoint(), in_process=True) as classifier:
        assert "trace" in [phase.name for phase in classifier.phases]
    assert isinstance(recall_or_find(ModelConfig(source=str(make_checkpoint())), Topology(1)), Remembered)
    shutil.rmtree(found.artifact.directory)
    assert isinstance(recall_or_find(ModelConfig(source=str(make_checkpoint())), Topology(1)), Checkpoint)


def test_spans_add_up_to_the_time_that_has_passed() -> None:
    seen: list[PhaseReport] = []
    started = time.monotonic()
    spans = Spans(seen.append, started)
    spans.end("first")
    time.sleep(0.05)  # what nobody names is the next one's
    spans.take(PhaseReport(7, "load", 0.01, ended=time.monotonic()))
    spans.take(PhaseReport(0, "late", 0.0, ended=started))  # of another process, whose message was overtaken
    time.sleep(0.02)
    spans.end("last")
    assert [report.name for report in seen] == ["first", "load", "late", "last"]
    assert seen == spans.reports
    assert seen[1].seconds >= 0.05
    assert seen[2].seconds == 0
    assert sum(report.seconds for report in seen) == pytest.approx(spans.ended - started)


def test_a_process_knows_when_it_was_started() -> None:
    code = "import time; time.sleep(0.2); from tpray.group.phases import process_started as p; print(p())"
    before = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert before - 0.02 <= float(ran.stdout) <= before + 0.2
    assert process_started() < before


def test_a_spare_belongs_to_the_first_who_asks_and_ends_with_him() -> None:
    """The owner is a process that ends; the spare another one."""
    code = (
        "import subprocess, sys, time\n"
        "from tpray.group.worker_host import WorkerHost\n"
        "owner = subprocess.Popen(['sleep', '60'])\n"
        "host = WorkerHost()\n"
        "assert host.claim(owner.pid) and not host.claim(1)\n"
        "host.leave()\n"
        "host.leave(1)\n"
        "print('claimed', flush=True)\n"
        "owner.kill(); owner.wait()\n"
        "time.sleep(30); sys.exit(3)\n"
    )
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert (ran.returncode, ran.stdout) == (0, "claimed\n")
    assert time.monotonic() - started < 25
    assert WorkerHost()._owner is None


def test_the_canary_is_compared_however_the_codec_was_made(make_checkpoint: MakeCheckpoint, own_cache: None) -> None:
    """Facts that are wrong, as of another tokenizer, do not serve."""
    from dataclasses import replace

    from tpray.errors import ParityError
    from tpray.serving.tokenizer_facts import keep_facts

    load(make_checkpoint())
    model = ModelConfig(source=str(make_checkpoint()))
    artifact = asyncio.run(resolve(recall_or_find(model, Topology(1)), model, Topology(1))).artifact
    assert artifact is not None
    path = facts_path(artifact.manifest.model_files, artifact.manifest.model.max_length)
    facts = read_facts(path)
    assert facts is not None
    whole = path.read_text()
    path.write_text(whole.replace("e", "f", 1) if whole.index("e") < 64 else whole[:-2])
    assert read_facts(path) is None, "damaged ones are none"
    path.write_text(whole[:-9] + "x" + whole[-8:])
    assert read_facts(path) is None
    keep_facts(path, replace(facts, templates=facts.templates[::-1]))
    with pytest.raises((ParityError, ValueError, IndexError)):
        Engine._make_codec(artifact)


def test_a_replica_knows_whether_the_start_is_still_watched() -> None:
    receiver = Receiver()
    sender = Sender(receiver.address)
    assert sender.heard
    receiver.close()
    assert not sender.heard
    assert not Sender(None).heard


def test_what_a_spare_imports_is_there() -> None:
    """By name, so that the module of the host itself needs none of it."""
    code = "from tpray.group.worker_host import WorkerHost as H; host = H(); host.preload(2)"
    assert loaded_by(code, "torch", "transformers", "ray") == ["torch"]
    assert loaded_by(f"{code}; host.prepare_to_trace()", "torch", "transformers", "ray") == ["torch", "transformers"]


@pytest.mark.usefixtures("own_cache")
def test_of_what_is_remembered_the_newest_is_kept() -> None:
    folder = cache_dir() / "notes"
    for number in range(KEPT_FILES + 3):
        path = folder / str(number)
        write_whole(path, "x")
        os.utime(path, ns=(number, number))  # the clock of some disks is coarse
    kept = {path.name for path in folder.iterdir()}
    assert kept == {str(number) for number in range(3, KEPT_FILES + 3)}


def test_a_spare_computes_alone_until_it_is_a_rank() -> None:
    """The threads of its pool are those of the rank's program; see `ProgramThread`."""
    code = (
        "from tpray.group.worker_host import WorkerHost as H; host = H(); host.preload(2)\n"
        "import torch; from tpray.group.program_thread import ProgramThread\n"
        "print(torch.get_num_threads(), ProgramThread('rank', 2).do(torch.get_num_threads))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert ran.stdout == "1 2\n"


@pytest.mark.usefixtures("own_cache")
def test_what_was_asked_of_transformers_is_asked_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A spare asks on a first start. The replica resolves and tokenises without transformers and torch."""
    model = ModelConfig(source=str(make_checkpoint()))
    located = locate(model, Topology(1))
    assert isinstance(located, Checkpoint)
    task = prepare.check_and_describe(located, model, Topology(1))
    prepare.learn_tokenizer(task)
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    code = (
        "import asyncio, pickle; from pathlib import Path\n"
        "from tpray.artifacts.folder import copy_model_files\n"
        "from tpray.artifacts.resolve import resolve\n"
        "from tpray.config import ModelConfig; from tpray.platforms.topology import Topology\n"
        "from tpray.serving.codec import TextCodec; from tpray.serving.tokenizer_facts import facts_path, read_facts\n"
        f"folder = Path({str(tmp_path)!r}); task = pickle.loads((folder / 'task').read_bytes())\n"
        f"model = ModelConfig(source={model.source!r})\n"
        "resolution = asyncio.run(resolve(task, model, Topology(1)))\n"
        "assert resolution.task == task and resolution.artifact is None\n"
        "copied = copy_model_files(task.model_files, folder / 'model')\n"
        "facts = read_facts(facts_path(copied, task.model.max_length))\n"
        "assert TextCodec(folder / 'model', task.model, facts).encode(['a text'])\n"
    )
    assert loaded_by(code, *HEAVY, "ray") == []


def test_a_spare_refuses_what_cannot_be_served() -> None:
    model = ModelConfig(source=str(DEMO_DIR))
    located = locate(model, Topology(5))
    assert isinstance(located, Checkpoint), "nothing of transformers was asked yet"
    with pytest.raises(DegreeError):
        prepare.check_and_describe(located, model, Topology(5))


def test_why_serve_did_not_start_is_said_and_not_where() -> None:
    from ray.exceptions import RayTaskError

    crash = RuntimeError("HAProxy crashed: Traceback:\n  File a\nValueError: 2 lines")
    raised: RayTaskError = RayTaskError("ray::HAProxyManager.ready()", "a remote traceback", crash)
    assert _reason(raised.as_instanceof_cause()) == "HAProxy crashed: Traceback: ... ValueError: 2 lines"
    assert _reason(ValueError("one line")) == "one line"
    assert _reason(ValueError()) == "ValueError"
