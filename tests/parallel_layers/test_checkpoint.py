"""What is read of a checkpoint, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpray.errors import CheckpointError, ModelNotFoundError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.shard import build_shard
from tpray.parallel_layers.weights import open_weights


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))


def shard_state(directory: Path) -> dict[str, torch.Tensor]:
    with parallel_state.use(1, 2):
        return build_shard(find_checkpoint(directory), torch.float32).state_dict()


def test_every_file_format_gives_the_same_shard(checkpoint: Path) -> None:
    """safetensors, its index of parts, and a pickled .bin, also with the first BERTs' gamma and beta."""
    expected = shard_state(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, checkpoint / f"part-{number}.safetensors")
        places |= dict.fromkeys(part, f"part-{number}.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    parts = shard_state(checkpoint)
    index.unlink()
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
    torch.save(old, checkpoint / "pytorch_model.bin")
    pickled = shard_state(checkpoint)
    for name, value in expected.items():
        assert torch.equal(value, parts[name])
        assert torch.equal(value, pickled[name])


def test_a_pickle_that_would_run_code_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("run",))

    torch.save({"x": Evil()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        shard_state(checkpoint)


def test_missing_and_misshapen_tensors_are_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "classifier" not in n}, path)
    with pytest.raises(CheckpointError, match=r"classifier\.weight.*without a classification head"):
        shard_state(checkpoint)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file(tensors | {name: torch.zeros(64, 32)}, path)
    with pytest.raises(CheckpointError, match=r"query\.weight has the shape \[64, 32\].* and \[64, 64\]"):
        shard_state(checkpoint)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_a_tensor_that_a_file_lacks_is_named(name: str, tmp_path: Path) -> None:
    tensors, path = {"there": torch.zeros(4, 4)}, tmp_path / name
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    file = open_weights(path)
    assert file.piece("there", 1, 0, 2).shape == (4, 2)
    for read in (file.shape, file.whole, lambda tensor: file.piece(tensor, 0, 0, 1)):
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} has no tensor absent"):
            read("absent")


def test_a_damaged_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        shard_state(checkpoint)


def test_sources_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="no directory"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no config"):
        find_checkpoint(tmp_path)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"acme/absent .*network"):
        find_checkpoint("acme/absent")


def test_the_digest_follows_the_content(checkpoint: Path) -> None:
    before = find_checkpoint(checkpoint).digest
    assert find_checkpoint(checkpoint).digest == before
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    assert find_checkpoint(checkpoint).digest != before
