"""Every architecture, traced and loaded again, against the stock model; ranks are threads on the real wire.

Bounds: float32 differs by the order of additions only, 1e-5 of logits near 1; a row beside others of other
lengths is computed by other kernels, 1e-6 of a score.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tpray.config import ModelConfig
from tpray.errors import ParityError
from tpray.group.group import ShardGroup
from tpray.group.ranks import ThreadRanks
from tpray.group.store import Source
from tpray.parallel_layers.plan import PLANS
from tpray.runtime.canary import check_canary


def rows(lengths: list[int], pad_id: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    shape = len(lengths), max(lengths)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    types = np.zeros(shape, dtype=np.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = rng.integers(5, 120, length)
        mask[i, :length] = 1
        types[i, length // 2 : length] = 1
    return [ids, mask, types]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model_type", PLANS)
def test_sharded_logits_equal_the_stock_models(model_type: str, tp: int, make_checkpoint: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    directory = make_checkpoint(model_type)
    stock = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    batch = rows([1, 33, 7, 78, 16], stock.config.pad_token_id)
    named = dict(zip(("input_ids", "attention_mask", "token_type_ids"), map(torch.from_numpy, batch), strict=True))
    if getattr(stock.config, "type_vocab_size", 0) < 2:
        del named["token_type_ids"]
    with torch.no_grad():
        expected = stock(**named).logits.numpy()

    async def run() -> tuple[np.ndarray, list[np.ndarray]]:
        group = ShardGroup(Source(ModelConfig(source=str(directory), dtype="float32"), tp), ThreadRanks(tp))
        await group.start()
        try:
            together = (await group.step(batch)).logits
            alone = []
            for i, length in enumerate(batch[1].sum(1)):
                alone.append((await group.step([part[i : i + 1, :length] for part in batch])).logits[0])
            return together, alone
        finally:
            await group.stop()

    together, alone = asyncio.run(run())
    np.testing.assert_allclose(together, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.stack(alone), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(softmax(np.stack(alone)), softmax(together), atol=1e-6, rtol=0)


def test_the_canary_refuses_wrong_logits_and_nan(make_checkpoint: Callable[..., Path]) -> None:
    from tpray.parallel_layers.checkpoint import resolve
    from tpray.runtime.canary import make_canary

    canary = make_canary(resolve(make_checkpoint()))
    logits = torch.tensor(canary.logits)
    assert check_canary(canary, logits, "float32") == 0.0
    for wrong in (logits + 0.01, logits * float("nan")):
        with pytest.raises(ParityError, match="must not serve"):
            check_canary(canary, wrong, "float32")
