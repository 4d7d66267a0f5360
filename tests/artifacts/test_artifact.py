"""An artifact vouches for itself: what is damaged or altered is refused by name, and traced again."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tpray.artifacts.folder import Artifact
from tpray.artifacts.resolve import find_files
from tpray.config import ModelConfig
from tpray.errors import ArtifactError, ConfigError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.runtime.cpu.lowered import load_graphs

pytestmark = pytest.mark.usefixtures("own_cache")


def start(model: ModelConfig, tp: int = 2, out: Path | None = None) -> ClassifierGroup:
    """Start a group on threads, stop it, and return it for a look at what it did."""
    group = ClassifierGroup(model, ThreadExecutor(tp), out=out)

    async def run() -> None:
        await group.start()
        await group.step([np.ones((1, 3), dtype=np.int64)] * 3)
        await group.stop()

    asyncio.run(run())
    return group


@pytest.fixture
def model(make_checkpoint: Callable[..., Path]) -> ModelConfig:
    return ModelConfig(source=str(make_checkpoint()), dtype="float32")


def test_the_second_start_traces_nothing(model: ModelConfig) -> None:
    first, second = start(model), start(model)
    assert [p.name for p in first.phases] == [
        "resolve", "place", "spawn", "pin", "connect", "trace", "load", "check", "warm up",
    ]  # fmt: skip
    assert not second.traced
    assert "trace" not in [p.name for p in second.phases]
    assert sum(p.seconds for p in second.phases) < sum(p.seconds for p in first.phases), "the trace is not there"


def test_a_flipped_bit_is_found_and_the_model_traced_again(
    model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = start(model).artifact
    for name in ("manifest.json", "rank_01/weights.safetensors", "rank_00/graph_0.json", "model/config.json"):
        path = artifact.directory / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        caplog.clear()
        assert start(model).traced, name
        assert str(path) in caplog.text
    assert not start(model).traced


def test_a_users_own_artifact_is_refused_and_kept(model: ModelConfig, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    start(model, out=out)
    own = ModelConfig(source=str(out))
    assert not start(own).traced
    with pytest.raises(ConfigError, match="traced for tp 2, not 4"):
        start(own, tp=4)
    (out / "rank_00" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"rank_00/weights\.safetensors"):
        start(own)
    assert out.is_dir()


def test_an_altered_manifest_is_refused_even_when_it_is_valid(model: ModelConfig) -> None:
    artifact = start(model).artifact
    path = artifact.directory / "manifest.json"
    stored = json.loads(path.read_text())
    stored["canary"]["logits"][0][0] += 1.0
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        Artifact.open(artifact.directory)


def test_a_graph_that_calls_anything_else_is_refused(model: ModelConfig) -> None:
    artifact = start(model).artifact
    path = artifact.rank_directory(0) / "graph_0.json"
    whole = path.read_text()
    for name in ("os.system", "operator.methodcaller", "aten.from_file.default", "mkldnn.__class__.x", "math.prod"):
        path.write_text(whole.replace("aten.layer_norm.default", name, 1))
        with pytest.raises(ArtifactError, match=f"calls {re.escape(name)}, which"):
            load_graphs(artifact.rank_directory(0))


def test_cut_and_missing_files_are_named_before_anything_starts(model: ModelConfig, tmp_path: Path) -> None:
    """Of a folder that the user names; what is in them is each rank's to check."""
    start(model, out=tmp_path / "a")
    named, topology = ModelConfig(source=str(tmp_path / "a")), ThreadExecutor(2).topology
    find_files(named, topology)
    file = tmp_path / "a/rank_01/weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"rank_01/weights\.safetensors is damaged or was changed"):
        find_files(named, topology)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"rank_01/weights\.safetensors is missing: trace it again"):
        find_files(named, topology)
