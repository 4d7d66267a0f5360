"""What is read of a checkpoint, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpray.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.architectures import PLANS
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
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
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


@pytest.mark.parametrize(
    "stored",
    [
        [], {}, {"weight_map": {"a": "b"}}, {"metadata": {}, "weight_map": []}, {"metadata": {}, "weight_map": {}},
        {"metadata": {}, "weight_map": {"a": 1}},
    ],
)  # fmt: skip
def test_an_index_of_another_form_is_named(stored: Any, tmp_path: Path) -> None:
    """Without ``metadata`` transformers' own model, which the shards are compared with, raises a bare KeyError."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"index\.json is no index of weights: the form is"):
        _ = find_checkpoint(tmp_path).weight_files


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


def test_what_a_tokenizer_gives_besides_ids_mask_and_types_is_refused(tmp_path: Path) -> None:
    """RoCBERT's words have shapes and pronunciations: without them its answers would be others."""
    from transformers import AutoModelForSequenceClassification, RoCBertConfig, RoCBertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for name in ("shape.json", "pronunciation.json"):
        (tmp_path / name).write_text(json.dumps({word: i for i, word in enumerate(words)}))
    files = (str(tmp_path / name) for name in ("vocab.txt", "shape.json", "pronunciation.json"))
    RoCBertTokenizer(*files).save_pretrained(tmp_path / "model")
    sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForSequenceClassification.from_config(RoCBertConfig(**sizes)).save_pretrained(tmp_path / "model")
    checkpoint = dataclasses.replace(find_checkpoint(tmp_path / "model"), own_plan=PLANS["bert"])
    with pytest.raises(UnsupportedModelError, match="input_pronunciation_ids, input_shape_ids besides"):
        checkpoint.check_classifier()


def test_a_tokenizer_that_ends_no_text_is_refused_where_the_label_is_read_there(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = find_checkpoint(make_checkpoint("bart"))
    checkpoint.config.eos_token_id = 7
    with pytest.raises(CheckpointError, match=r"puts none of the eos_token_id 7 .*correct either"):
        checkpoint.check_classifier()


def test_a_rotary_embedding_that_transformers_does_not_know_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of which its model would raise a bare KeyError."""
    directory = shutil.copytree(make_checkpoint("llama", num_hidden_layers=1), tmp_path / "m")
    file = directory / "config.json"
    own = {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 10000.0}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(
        UnsupportedModelError, match="of the type nonsense .* and transformers has default, dynamic, li"
    ):
        find_checkpoint(directory).check_classifier()


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
def test_a_decoder_whose_tokens_see_what_follows_is_refused(
    model_type: str, make_checkpoint: Callable[..., Path]
) -> None:
    """Of gemma transformers' own scores hang on padding then; gemma3's masks are none that a trace takes."""
    directory = make_checkpoint(model_type, use_bidirectional_attention=True, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="has use_bidirectional_attention"):
        find_checkpoint(directory).check_classifier()


def test_only_the_language_that_texts_are_in_is_loaded(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_checkpoint("xmod")
    assert find_checkpoint(directory).config.languages == ["de_DE"]
    other = tmp_path / "model"
    shutil.copytree(directory, other)
    stored = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(stored | {"default_language": None}))
    with pytest.raises(UnsupportedModelError, match=r"languages en_XX, de_DE.*set default_language"):
        find_checkpoint(other).check_classifier()


@pytest.mark.parametrize("kept", ["transformer.shared.weight", "transformer.decoder.embed_tokens.weight"])
def test_tied_parameters_are_one_tensor_whichever_is_stored(
    kept: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(make_checkpoint("t5"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[kept] = tensors.pop("transformer.shared.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with parallel_state.use(1, 2):
        model: Any = build_shard(find_checkpoint(directory), torch.float32).model
    found = [m.weight.data_ptr() for name, m in model.named_modules() if name.endswith(("shared", "embed_tokens"))]
    assert len(found) == 3
    assert len(set(found)) == 1
