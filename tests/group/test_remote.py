"""Artifacts at a URL: copied once, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tpray import load
from tpray.errors import ArtifactError, ConfigError, ModelNotFoundError
from tpray.group import remote
from tpray.group.ranks import ThreadRanks


def test_published_once_and_served_from_there(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    out, url = tmp_path / "artifact", f"file://{tmp_path}/bucket/model"
    with load(make_checkpoint(), tp=2, dtype="float32", out=out, ranks=ThreadRanks(2)) as classifier:
        wanted = classifier.classify("a b c")
    remote.publish(out, url)
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(remote.fetch, [url] * 4))
    assert len(copies) == 1
    with load(url, tp=2, ranks=ThreadRanks(2)) as classifier:
        assert classifier.classify("a b c") == wanted
        assert not classifier.group.traced
    weights = tmp_path / "bucket/model/rank_01/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "bucket/model/manifest.json").open("a").write("\n")  # another upload, of another digest
    with pytest.raises(ArtifactError, match="rank_01"), load(url, tp=2, ranks=ThreadRanks(2)):
        pass


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no artifact can be read at file:///"):
        remote.fetch(f"file://{tmp_path}/absent")
    with pytest.raises(ConfigError, match="nosuch"):
        remote.fetch("nosuch://bucket/model")


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    (folder / "rank_00").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "rank_00" / "x").write_text("x")
    from fsspec.implementations.local import LocalFileSystem

    def broken(*_: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "get_file", broken)
        with pytest.raises(ModelNotFoundError, match="gone"):
            remote.fetch(f"file://{folder}")
    assert remote.fetch(f"file://{folder}").joinpath("rank_00", "x").read_text() == "x"
