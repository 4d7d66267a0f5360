"""Classifiers of tokens: each architecture's, sharded, against the stock model; some of them traced, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as HEADS

from tests.helpers import pad_id_of, rows
from tests.parallel_layers.test_architectures import sharded_logits
from tests.runtime.test_parity import each_alone, group_logits
from tpray.errors import CheckpointError, UnsupportedModelError
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.shard import ShardedClassifier
from tpray.parallel_layers.tasks import TOKEN, auto_class, task_of

TOKENS = ["ForTokenClassification"]
TYPES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert", "albert", "camembert"]


def stock_logits(directory: Path, batch: list[np.ndarray]) -> np.ndarray:
    """What transformers' own model answers for each row by itself, with zeros behind it."""
    config = find_checkpoint(directory).config
    stock = ShardedClassifier(auto_class(config).from_pretrained(directory, dtype=torch.float32).eval())
    made = np.zeros((*batch[0].shape, config.num_labels), dtype=np.float32)
    with torch.no_grad():
        for i, row in enumerate(each_alone(batch)):
            made[i, : row[0].shape[1]] = stock(*map(torch.from_numpy, row)).numpy()
    return made


@pytest.mark.parametrize(
    "model_type",
    [m if m in TYPES else pytest.param(m, marks=pytest.mark.slow) for m in (*PLANS, "mistral", "gemma2") if m in HEADS],
)
def test_each_tokens_logits_are_the_stock_models(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = find_checkpoint(make_checkpoint(model_type, architectures=TOKENS))
    assert task_of(checkpoint.config) == TOKEN
    lengths = [9, 9] if checkpoint.plan.reads_padding else [1, 33, 7, 16]
    batch = rows(lengths, pad_id_of(checkpoint.directory))
    expected = stock_logits(checkpoint.directory, batch)
    bound = 1e-5 * max(1.0, np.abs(expected).max())
    for tp in (2, 3):
        for logits in sharded_logits(checkpoint, tp, batch):
            np.testing.assert_allclose(logits.numpy(), expected, atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "tp", "packs"),
    [("bert", 3, True), ("deberta-v2", 2, False), pytest.param("modernbert", 3, True, marks=pytest.mark.slow),
     pytest.param("qwen2", 2, True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_so_they_are_when_traced(model_type: str, tp: int, packs: bool, make_checkpoint: Callable[..., Path]) -> None:
    """Rows of mixed lengths, of one length, and padded on the left; packed where a classifier of texts packs them."""
    directory = make_checkpoint(model_type, architectures=TOKENS)
    batch = rows([1, 33, 7, 64, 16], pad_id_of(directory))
    left = [part[:, ::-1].copy() for part in batch]
    (together, *alone, turned), packed = group_logits(directory, "float32", tp, [batch, *each_alone(batch), left])
    assert packed == packs
    expected = stock_logits(directory, batch)
    bound = 1e-5 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(together, expected, atol=bound, rtol=0)
    for i, row in enumerate(alone):
        np.testing.assert_allclose(row[0], expected[i, : row.shape[1]], atol=bound, rtol=0)
    assert not turned[left[1] == 0].any(), "padding has zeros on either side"


def test_the_class_in_the_configuration_says_which_head_it_is(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A model without a head is refused, and one that transformers has not."""
    shutil.copytree(make_checkpoint("bert", architectures=TOKENS), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match="is a BertForMaskedLM, and tpray serves sequence and token classifiers"):
        find_checkpoint(tmp_path / "m").check_classifier()
    file.write_text(json.dumps(config | {"architectures": ["BartForTokenClassification"], "model_type": "bart"}))
    with pytest.raises(UnsupportedModelError, match="no token classifier of the type 'bart'"):
        find_checkpoint(tmp_path / "m").check_classifier()


def test_a_decoder_needs_no_padding_token(make_checkpoint: Callable[..., Path]) -> None:
    """None of its tokens is chosen by it."""
    checkpoint = find_checkpoint(make_checkpoint("qwen2", architectures=TOKENS))
    checkpoint.config.pad_token_id = None
    checkpoint.check_classifier()
    assert checkpoint.pad_id == 0
