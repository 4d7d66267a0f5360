"""The unsharded model's answers, which a group must give: of a checkpoint that is read whole, and layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.shard import streamed_model
from tpray.runtime import canary


@pytest.mark.parametrize("model_type", ["bert", "albert", "deberta", "llama", "t5"])
def test_read_layer_by_layer_a_model_answers_as_when_it_is_read_whole(
    model_type: str, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it cannot be, as DeBERTa, whose layers take the weights of another one; and T5's tied embeddings."""
    checkpoint = find_checkpoint(make_checkpoint(model_type))
    whole = canary.make_canary(checkpoint, 80)
    monkeypatch.setattr(canary, "LARGE_BYTES", 0)
    streamed = canary.make_canary(checkpoint, 80)
    np.testing.assert_allclose(streamed.logits, whole.logits, atol=1e-6, rtol=1e-6)
    for one, other in zip(streamed.texts, whole.texts, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-6, rtol=1e-6)


def test_weights_in_bfloat16_are_widened_as_they_are_read_and_let_go(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    directory = tmp_path / "half"
    shutil.copytree(make_checkpoint("llama"), directory)
    (directory / "model.safetensors").unlink()
    stock = AutoModelForSequenceClassification.from_pretrained(make_checkpoint("llama"), dtype=torch.bfloat16)
    stock.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    model = streamed_model(find_checkpoint(directory))
    ids = torch.arange(5, 17).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock.float()(ids).logits)
    assert all(parameter.is_meta for parameter in model.parameters())
