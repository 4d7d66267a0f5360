"""An artifact vouches for itself: what is damaged or altered is refused by name, and traced again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tpray.config import ModelConfig
from tpray.errors import ArtifactError, ConfigError
from tpray.group.group import ShardGroup
from tpray.group.ranks import ThreadRanks
from tpray.group.store import Source
from tpray.runtime.artifact import Artifact
from tpray.runtime.program import load_programs


def start(source: Source) -> ShardGroup:
    """Start a group on threads, stop it, and return it for a look at what it did."""
    group = ShardGroup(source, ThreadRanks(source.tp))

    async def run() -> None:
        await group.start()
        await group.step([np.ones((1, 3), dtype=np.int64)] * 3)
        await group.stop()

    asyncio.run(run())
    return group


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Source:
    return Source(ModelConfig(source=str(make_checkpoint()), dtype="float32"), tp=2)


def test_the_second_start_traces_nothing(source: Source) -> None:
    first, second = start(source), start(source)
    assert [p.name for p in first.phases] == [
        "resolve", "place", "spawn", "pin", "connect", "trace", "load", "check", "warm up",
    ]  # fmt: skip
    assert not second.traced
    assert "trace" not in [p.name for p in second.phases]
    assert all(p.seconds >= 0 for p in second.phases)


def test_a_flipped_bit_is_found_and_the_model_traced_again(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    artifact = start(source).artifact
    assert artifact is not None
    for name in ("manifest.json", "rank_01/weights.safetensors", "rank_00/program_0.json", "model/config.json"):
        path = artifact.directory / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        caplog.clear()
        assert start(source).traced, name
        assert str(path) in caplog.text
    assert not start(source).traced


def test_a_users_own_artifact_is_refused_and_kept(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    start(Source(source.model, 2, out=out))
    own = Source(ModelConfig(source=str(out)), tp=2)
    assert not start(own).traced
    with pytest.raises(ConfigError, match="traced for tp 2, not 4"):
        start(Source(own.model, tp=4))
    (out / "rank_00" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"rank_00/weights\.safetensors"):
        start(own)
    assert out.is_dir()


def test_an_altered_manifest_is_refused_even_when_it_is_valid(source: Source) -> None:
    artifact = start(source).artifact
    assert artifact is not None
    path = artifact.directory / "manifest.json"
    stored = json.loads(path.read_text())
    stored["canary"]["logits"][0][0] += 1.0
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        Artifact.open(artifact.directory)


def test_a_graph_that_calls_anything_else_is_refused(source: Source) -> None:
    artifact = start(source).artifact
    assert artifact is not None
    path = artifact.rank_directory(0) / "program_0.json"
    path.write_text(path.read_text().replace("torch.ops.aten.linear.default", "os.system", 1))
    with pytest.raises(ArtifactError, match=r"calls os\.system"):
        load_programs(artifact.rank_directory(0))
