"""Every architecture, traced and loaded again, against the stock model; ranks are threads on the real wire.

Bounds: float32 differs by the order of additions only, 1e-5 of logits near 1; a row beside others of other
lengths is computed by other kernels, 1e-6 of a score. bfloat16 has 8 bits: 2e-2 of the largest logit, or of a half.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import end_id_of, pad_id_of, rows
from tests.small_models import DISTINCT, OWN_SETTINGS, SUPPORTED, unless_distinct
from tpray.config import DtypeName, ModelConfig
from tpray.errors import ParityError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.shard import ShardedClassifier
from tpray.platforms.cpu import native_dtypes
from tpray.runtime.canary import check_logits


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    result: np.ndarray = e / e.sum(-1, keepdims=True)
    return result


def stock_logits(directory: Path, batch: list[np.ndarray]) -> np.ndarray:
    """What transformers' own model answers, unsharded and in float32."""
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        logits: np.ndarray = ShardedClassifier(stock)(*map(torch.from_numpy, batch)).numpy()
    return logits


def group_logits(
    directory: Path, dtype: DtypeName, tp: int, batches: list[list[np.ndarray]]
) -> tuple[list[np.ndarray], bool]:
    """What a group of ``tp`` ranks answers to each batch, and whether it packs rows."""

    async def run() -> tuple[list[np.ndarray], bool]:
        group = ClassifierGroup(ModelConfig(source=str(directory), dtype=dtype), ThreadExecutor(tp))
        await group.start()
        try:
            return [(await group.step(batch)).logits for batch in batches], group.packs_rows
        finally:
            await group.stop()

    return asyncio.run(run())


def each_alone(batch: list[np.ndarray]) -> list[list[np.ndarray]]:
    lengths = batch[1].sum(1)
    return [[part[i : i + 1, :length] for part in batch] for i, length in enumerate(lengths)]


PACKED = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "ernie", "layoutlm", "albert", "esm",
    "modernbert", "nomic_bert", "gpt2", "llama", "qwen2", "qwen3", "gemma",
    "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "gte", "jina_embeddings_v3",
    "mistral", "ministral", "ministral3", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "gpt_neox",
    "starcoder2", "stablelm", "smollm3", "nemotron", "arcee", "seed_oss", "exaone4", "esmc", "ultrabert",
    "gemma2", "glm", "glm4", "helium", "gptj", "rembert", "megatron-bert", "big_bird", "eurobert", "diffllama",
    "gpt_bigcode", "gpt-sw3", "persimmon", "biogpt", "hunyuan_v1_dense", "modernbert-decoder",
}  # fmt: skip
"""The architectures whose rows the CPU runtime packs end to end; the others' are padded."""


NARROW = {"bert", "deberta-v2", "llama"}
"""Which of them `make test` also runs in bfloat16."""
GROUPED = {m for m, settings in OWN_SETTINGS.items() if settings.get("num_key_value_heads") == 2} | {"gemma"}
TO_THE_END = {m for m, plan in PLANS.items() if plan.spare_position} | {"gpt2", "mistral", "opt", "biogpt"}
"""Those of which a row as long as their positions is tried."""
PADDED = {m for m, plan in PLANS.items() if plan.reads_padding}


@pytest.mark.parametrize(
    ("model_type", "tp", "heads"),
    [
        ("bert", 1, 4), ("bert", 4, 4),
        # 3 heads over 2 ranks are as uneven as 4 over 3, where query heads do not share key/value heads.
        *(unless_distinct(pytest.mark.nightly, m, *((3, 4) if m in GROUPED else (2, 3))) for m in SUPPORTED),
    ],
)  # fmt: skip
def test_sharded_logits_equal_the_stock_models(
    model_type: str, tp: int, heads: int, make_checkpoint: Callable[..., Path]
) -> None:
    directory = make_checkpoint(model_type, num_attention_heads=heads, hidden_size=16 * heads)
    longest = 80 if model_type in TO_THE_END else 64
    batch = rows([1, 33, 7, longest, 16], pad_id_of(directory), end_id_of(directory))
    expected = stock_logits(directory, batch)
    padded_left = [part[:, ::-1].copy() for part in batch]  # where rows are packed, this cannot be
    batches = [batch, *each_alone(batch), padded_left]
    (together, *alone, left), packs = group_logits(directory, "float32", tp, batches)
    assert packs == (model_type in PACKED), "an architecture lost its fast path, or won one"
    bound = 1e-5 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(together, expected, atol=bound, rtol=0)
    if packs:
        np.testing.assert_allclose(left, stock_logits(directory, padded_left), atol=bound, rtol=0)
    if model_type in PADDED:  # transformers' own answers depend on it
        expected = np.concatenate([stock_logits(directory, row) for row in each_alone(batch)])
        np.testing.assert_allclose(np.concatenate(alone), expected, atol=bound, rtol=0)
        return
    np.testing.assert_allclose(np.concatenate(alone), expected, atol=bound, rtol=0)
    np.testing.assert_allclose(softmax(np.concatenate(alone)), softmax(together), atol=2e-6, rtol=0)


def test_a_mean_over_tokens_is_each_rows_own(make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint("modernbert", classifier_pooling="mean")
    batch = rows([1, 33, 7, 64, 16, 16], pad_id_of(directory))
    (found,), packs = group_logits(directory, "float32", 2, [batch])
    assert packs
    np.testing.assert_allclose(found, stock_logits(directory, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["mobilebert", "bart"])
def test_a_row_may_be_shorter_than_what_is_cut_off_it(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    """Both shift a row by one token, so that of two there is one left: a size that a trace takes for a constant."""
    directory = make_checkpoint(model_type)
    batches = [rows([length] * 2, pad_id_of(directory), end_id_of(directory)) for length in (1, 2, 3)]
    answers, _ = group_logits(directory, "float32", 2, batches)
    for batch, found in zip(batches, answers, strict=True):
        np.testing.assert_allclose(found, stock_logits(directory, batch), atol=1e-5, rtol=0)


@pytest.mark.skipif("bfloat16" not in native_dtypes(), reason="this CPU has neither AVX512_BF16 nor AMX")
@pytest.mark.parametrize(
    "model_type", [m if m in NARROW else pytest.param(m, marks=pytest.mark.nightly) for m in sorted(DISTINCT)]
)
def test_bfloat16_logits_are_near_the_float32_ones(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint(model_type)
    batch = rows([1, 33, 7, 64, 16], pad_id_of(directory), end_id_of(directory))
    expected = stock_logits(directory, batch)
    (together, *alone), _ = group_logits(directory, "bfloat16", 2, [batch, *each_alone(batch)])
    bound = 2e-2 * max(0.5, np.abs(expected).max())
    np.testing.assert_allclose(together, expected, atol=bound, rtol=0)
    if model_type not in PADDED:
        np.testing.assert_allclose(np.concatenate(alone), expected, atol=bound, rtol=0)


def test_the_canary_refuses_wrong_logits_and_nan(make_checkpoint: Callable[..., Path]) -> None:
    from tpray.parallel_layers.checkpoint import find_checkpoint
    from tpray.runtime.canary import make_canary

    canary = make_canary(find_checkpoint(make_checkpoint()), 80)
    logits = np.array(canary.logits, dtype=np.float32)
    assert check_logits(logits, logits, "float32") == 0.0
    for wrong in (logits + 0.01, logits * float("nan")):
        with pytest.raises(ParityError, match="must not serve"):
            check_logits(logits, wrong, "float32")
