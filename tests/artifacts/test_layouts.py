"""Every layout that stock transformers reads is served as it answers, or refused in one true sentence at the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.serving.test_stock_answers import check
from tests.text_kinds import LINES
from tpray import load
from tpray.artifacts.resolve import find_model
from tpray.config import ModelConfig
from tpray.errors import CheckpointError, TprayError, UnsupportedModelError
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.platforms.topology import Topology

Change = Callable[[Path], object]


def edit(name: str, **settings: Any) -> Change:
    def change(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def config(**settings: Any) -> Change:
    return edit("config.json", **settings)


def tokenizer(**settings: Any) -> Change:
    return edit("tokenizer_config.json", **settings)


def pickled(zipped: bool) -> Change:
    def change(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        torch.save(weights, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return change


def write(name: str, data: bytes) -> Change:
    return lambda directory: (directory / name).write_bytes(data)


def without_text(directory: Path) -> None:
    for file in (*directory.glob("*tok*"), *directory.glob("vocab*")):
        file.unlink()


OWN_CODE = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}


@pytest.fixture
def changed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[Change], Path]:
    """A function that gives a copy of a small BERT with a change."""

    def make(change: Change) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(make_checkpoint(), directory)
        change(directory)
        return directory

    return make


@pytest.mark.parametrize(
    "change",
    [
        pickled(zipped=True),
        pickled(zipped=False),  # as torch wrote before 1.6
        lambda directory: (directory / "tokenizer").mkdir(),
        config(pad_token_id=-1),
        config(auto_map=OWN_CODE),  # of an architecture that transformers has: its own code is not needed
        tokenizer(model_max_length=64.0),
        tokenizer(model_max_length=float("inf")),
        tokenizer(truncation_side="left", model_max_length=40),
    ],
    ids=["bin", "old bin", "folder tokenizer", "pad -1", "auto_map", "a float", "infinity", "cut on the left"],
)  # fmt: skip
def test_what_stock_reads_is_served_as_stock_answers(change: Change, changed: Callable[[Change], Path]) -> None:
    check(changed(change), ["the firm", "a b c d", ("the firm", "in Paris")])


def test_labels_may_be_numbers(changed: Callable[[Change], Path]) -> None:
    directory = changed(config(id2label={"0": 10, "1": 20, "2": 30}, label2id={"10": 0, "20": 1, "30": 2}))
    with load(directory, dtype="float32", executor=ThreadExecutor(1)) as classifier:
        assert {score["label"] for score in classifier.classify("a b")} == {"10", "20", "30"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (config(id2label={"1": "a", "2": "b", "3": "c"}), CheckpointError, "id2label .* keys 1, 2, 3, .* from 0 to 2"),
        (config(id2label=["a", "b"]), CheckpointError, "is not a transformers configuration"),
        (config(pad_token_id="0"), CheckpointError, "'pad_token_id' expected int"),
        (config(hidden_size="64"), CheckpointError, "'hidden_size' expected int, got str"),
        (config(hidden_size=32), CheckpointError, r"word_embeddings.weight has the shape \[120, 64\]"),
        (config(num_hidden_layers=3), CheckpointError, "lacks 16 tensors of a BertForSequenceClassification"),
        (config(architectures=["BertForMaskedLM"]), CheckpointError, "is a BertForMaskedLM"),
        (config(architectures=["BertModel"]), CheckpointError, "is a BertModel, and tpray serves sequence and token"),
        (config(auto_map=OWN_CODE, model_type="mine"), UnsupportedModelError, "'mine' would have to be part of"),
        (config(model_type="mine"), UnsupportedModelError, "does not know the architecture 'mine'"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), UnsupportedModelError, "is quantised"),
        (write("adapter_config.json", b"{}"), CheckpointError, "an adapter beside its weights"),
        (tokenizer(model_max_length=2), CheckpointError, "more than the 3 special ones"),
        (write("config.json", b"[1]"), CheckpointError, "it is not a JSON object"),
        (write("config.json", b"{"), CheckpointError, "is not a transformers configuration"),
        (tokenizer(model_max_length="64"), CheckpointError, "model_max_length .* is '64'"),
        (tokenizer(model_max_length=0), CheckpointError, "model_max_length .* is 0"),
        (
            tokenizer(auto_map={"AutoTokenizer": ["own.T", None]}, tokenizer_class="Own"),
            CheckpointError,
            "Own; auto_map",
        ),
        (write("tokenizer.json", b"{"), CheckpointError, "no tokenizer that transformers can load"),
        (without_text, CheckpointError, "has no words, .*tokenizer.json, vocab.txt"),
        (write("model.safetensors", b"\0" * 99), CheckpointError, "model.safetensors is damaged"),
        (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), CheckpointError, "git lfs pull"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_starts(
    change: Change, error: type[TprayError], words: str, changed: Callable[[Change], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In one sentence, and without a question on the terminal."""
    with pytest.raises(error, match=words) as caught:
        find_model(ModelConfig(source=str(changed(change))), Topology(2))
    assert len(str(caught.value).splitlines()) == 1
    assert "[y/N]" not in capfd.readouterr().out


def test_a_sentencepiece_file_alone_is_taken_along(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Files are taken by what the tokenizer's class names: without spm.model every word would be unknown."""
    import sentencepiece

    directory = tmp_path / "model"
    shutil.copytree(make_checkpoint("deberta-v2"), directory)
    (directory / "tokenizer.json").unlink()
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(directory / "spm"), vocab_size=100, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    check(directory, ["the firm is in Paris", "hello", ("a train", "to Berlin")])
    files = find_checkpoint(directory).model_files
    assert set(files) == {"config.json", "spm.model", "tokenizer_config.json"}, "they are in the digest, too"


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("roberta", {"pad_token_id": None}, "names no pad_token_id, behind which the positions of a roberta start"),
        ("gpt2", {"pad_token_id": None}, "names no pad_token_id, and a gpt2 classifier finds the last token"),
        ("gpt2", {"pad_token_id": 5000}, "has the pad_token_id 5000"),
    ],
)
def test_a_pad_id_that_is_needed_is_asked_for(
    model_type: str, changes: dict[str, Any], words: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(make_checkpoint(model_type), directory)
    config(**changes)(directory)
    with pytest.raises(TprayError, match=words):
        find_model(ModelConfig(source=str(directory)), Topology(2))
