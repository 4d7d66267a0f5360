"""Text in, scores out: what stock transformers gives for each text by itself, whatever else is in the batch.

Every architecture with a tokenizer of its own kind, through the served path (codec, batcher, step), in float32.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests import small_models, text_kinds
from tests.small_models import SUPPORTED, unless_distinct
from tests.text_kinds import RESIDUES, WORDS
from tpray import load
from tpray.artifacts.folder import record_files
from tpray.artifacts.manifest import Manifest, ModelRecord, read_manifest, write_manifest
from tpray.artifacts.resolve import find_model
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import CheckpointError, InputError, ParityError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.platforms.topology import Topology
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.engine import Engine
from tpray.serving.http import make_app
from tpray.serving.scores import RAW
from tpray.tokenizer import Plain, stock_rows

MOST = 12
SLOW = pytest.mark.slow
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
    },
}  # fmt: skip
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 20, "factor": 4.0,
    },
}  # fmt: skip


def texts(seed: int, model_type: str) -> list[Plain]:
    """Items of near lengths, with pairs, accents and special tokens among them."""
    rng = random.Random(seed)
    words = [*RESIDUES[:20]] if model_type == "esm" else [*WORDS, "Paris", "naïve", "É", "42", "—"]
    made: list[Plain] = [" ".join(rng.choice(words) for _ in range(n)) for n in (1, 2, 2, 3, 3, 4, 4, 5)]
    pairs = [(str(a), str(b)) for a, b in zip(made[:3], made[4:7], strict=True)]
    return [*made, *pairs][:MOST]


def stock_logits(directory: Path, items: list[Plain]) -> np.ndarray:
    """transformers' own tokenizer and model, an item at a time, as its pipeline calls them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    accepted = inspect.signature(model.forward).parameters
    rows = []
    for item in items:
        inputs = tokenizer(*([item] if isinstance(item, str) else item), return_tensors="pt")
        with torch.no_grad():
            output = model(**{name: value for name, value in inputs.items() if name in accepted})
        rows.append((output[0] if isinstance(output, tuple) else output.logits)[0].numpy())
    return np.stack(rows)


def served_logits(
    directory: Path, items: list[Plain], buckets: tuple[tuple[int, int], ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores in the order of the labels: all items in one batch over HTTP, and each alone from the engine."""

    async def run() -> tuple[np.ndarray, np.ndarray]:
        model = ModelConfig(source=str(directory), dtype="float32", buckets=buckets)
        engine = Engine(ClassifierGroup(model, ThreadExecutor(2)), BatchConfig(max_padding=0.9))
        await engine.start()
        try:
            labels = engine.group.artifact.manifest.model.labels

            def in_order(scores: list[dict[str, Any]]) -> list[float]:
                return [next(s["score"] for s in scores if s["label"] == label) for label in labels]

            transport = httpx.ASGITransport(make_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
                body = {"inputs": [[i] if isinstance(i, str) else list(i) for i in items], "raw_scores": True}
                together = [in_order(scores) for scores in (await http.post("/predict", json=body)).json()]
            alone = [(await engine.classify([item], RAW)).scores[0] for item in items]
            return np.array(together), np.array([in_order([asdict(s) for s in scores]) for scores in alone])
        finally:
            await engine.stop()

    return asyncio.run(run())


def check(directory: Path, items: list[Plain], buckets: tuple[tuple[int, int], ...] = ()) -> None:
    expected = stock_logits(directory, items)
    bound = 1e-5 * max(1.0, np.abs(expected).max())
    together, alone = served_logits(directory, items, buckets)
    np.testing.assert_allclose(alone, expected, atol=bound, rtol=0)
    np.testing.assert_allclose(together, expected, atol=bound, rtol=0)


@pytest.mark.parametrize(
    "model_type",
    [unless_distinct(pytest.mark.slow, m) for m in SUPPORTED if m in small_models.DISTINCT or m in text_kinds.DISTINCT],
)
def test_every_text_gets_what_transformers_gives_it(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    """Of each plan one architecture, and of each kind of tokenizer."""
    check(make_checkpoint(model_type), texts(1, model_type))


@pytest.mark.parametrize(
    "model_type",
    [
        *("bert", "roberta", "gpt2", "llama", "esm", "deberta-v2"),
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("xlm-roberta", "modernbert", "mpnet", "xlm", "bart", "gemma")
        ),
    ],
)
def test_so_it_is_with_buckets(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    check(make_checkpoint(model_type), texts(2, model_type), ((4, 16), (4, 32)))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("xlm", {"summary_type": "last"}),
        ("xlm", {"summary_type": "mean"}),
        ("flaubert", {"summary_type": "cls_index"}),
        ("modernbert", {"classifier_pooling": "mean"}),
        ("gpt2", {"pad_token_id": 7}),  # a word that texts contain, and at their ends
        ("roberta", {"pad_token_id": 7}),
        ("bert", {"pad_token_id": None}),
        ("bert", {"pad_token_id": 9}),
        ("mpnet", {"pad_token_id": 9}),  # whose positions start behind 1 all the same
        ("bert", {"return_dict": False, "chunk_size_feed_forward": 1}),
        ("llama", LONGROPE),  # whose factors follow the longest row of a step
        pytest.param("phi3", LONGROPE, marks=SLOW),
        pytest.param("llama", YARN, marks=SLOW),
        pytest.param("mistral", {"pad_token_id": 7}, marks=SLOW),
        pytest.param("falcon", {"alibi": True}, marks=SLOW),
        pytest.param("gemma2", {"num_hidden_layers": 3, "layer_types": None}, marks=SLOW),
    ],
)
def test_so_it_is_however_the_head_is_configured(
    model_type: str, changes: dict[str, Any], make_checkpoint: Callable[..., Path]
) -> None:
    """Heads that read the last position, a mean, or padding are found from what they do."""
    check(make_checkpoint(model_type, **changes), texts(3, model_type))


@pytest.mark.parametrize("model_type", ["bart", pytest.param("mbart", marks=SLOW), pytest.param("t5", marks=SLOW)])
def test_a_text_may_contain_the_end_of_sequence(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    """An encoder-decoder's label is read from the last one: transformers computes no two rows that differ in them."""
    check(
        make_checkpoint(model_type), [*texts(6, model_type), "the firm </s> in Paris", "</s>", "a </s></s> b <pad> c"]
    )


def edited(checkpoint: Path, target: Path, **settings: Any) -> Path:
    """A copy whose tokenizer_config.json has other settings."""
    shutil.copytree(checkpoint, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bert", {"model_input_names": ["input_ids", "attention_mask"]}),
        ("bert", {"do_lower_case": False}),
        ("bert", {"split_special_tokens": True}),
        ("roberta", {"add_prefix_space": True}),
        ("gpt2", {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}),
        ("llama", {"add_bos_token": True}),
    ],
)
def test_settings_of_the_tokenizer_act(
    model_type: str, settings: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    special = "[SEP]" if model_type == "bert" else "</s>"
    directory = edited(make_checkpoint(model_type), tmp_path / "model", **settings)
    check(directory, [*texts(4, model_type), f"the firm {special} in Paris", "The FIRM"])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "esm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_too_long_is_cut_where_the_tokenizer_says(
    side: str, model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The ids of transformers' own truncation, for texts and pairs; a caller may say another end."""
    directory = edited(make_checkpoint(model_type), tmp_path / "model", truncation_side=side)
    checkpoint = find_checkpoint(directory)
    record = ModelRecord(
        source="m", revision=None, digest="", model_type=model_type, max_length=12, labels=("a",), problem_type=None,
        vocab_size=checkpoint.config.vocab_size, token_types=2, pad_id=0, plan={"rules": []},
    )  # fmt: skip
    codec = TextCodec(directory, record)
    items = [text * 6 if isinstance(text, str) else (text[0] * 5, text[1] * 3) for text in texts(5, model_type)]
    assert codec.encode(items, truncate=True) == stock_rows(checkpoint.tokenizer, items, 12, side)
    other: Direction = "Left" if side == "right" else "Right"
    assert codec.encode(items, True, other) == stock_rows(checkpoint.tokenizer, items, 12, other.lower())


def with_added_token(checkpoint: Path, target: Path, token: str) -> Path:
    """A copy whose tokenizer knows one token more than the model's embedding."""
    from transformers import AutoTokenizer

    shutil.copytree(checkpoint, target)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(target)
    return target


def test_a_token_that_the_model_lacks_is_its_items_error_and_nobody_elses(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Before the queue: the other requests are answered, and no rank is disturbed."""
    directory = with_added_token(make_checkpoint("bert", vocab_size=57), tmp_path / "model", "[NEW]")

    async def run() -> None:
        engine = Engine(ClassifierGroup(ModelConfig(source=str(directory)), ThreadExecutor(2)), BatchConfig())
        await engine.start()
        try:
            good = [asyncio.ensure_future(engine.classify(["the firm"])) for _ in range(4)]
            with pytest.raises(
                InputError, match=r"item 1 has the token '\[new\]' with the id 57.* ends at 56"
            ) as caught:
                await engine.classify(["the firm", "the [NEW] firm"])
            assert caught.value.item == 1
            for answer in await asyncio.gather(*good):
                assert answer.scores
            for array in (np.array([[2, 57]]), np.array([[-1, 2]]), np.ones((1, 81), int), np.ones((1, 0), int)):
                with pytest.raises(InputError):
                    await engine.logits([array, array * 0 + 1, array * 0])
            assert engine.restarts == 0
        finally:
            await engine.stop()

    asyncio.run(run())


def test_a_tokenizer_that_cannot_be_the_models_is_refused_by_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """By `find_model`, with which every start and `tpray doctor MODEL` begin."""
    small = make_checkpoint("bert", vocab_size=40)
    with pytest.raises(CheckpointError, match=r"17 words that the model's vocabulary of 40 lacks.*another model"):
        find_model(ModelConfig(source=str(small)), Topology(2))
    empty = tmp_path / "empty"
    shutil.copytree(make_checkpoint("deberta-v2"), empty)
    (empty / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"(has no words.*spm\.model|no tokenizer that transformers can load)"):
        find_model(ModelConfig(source=str(empty)), Topology(2))


def test_a_tokenizer_of_other_words_than_when_traced_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its ids are those of the texts that were kept with the artifact, or the group does not serve."""
    out = tmp_path / "artifact"
    with load(make_checkpoint("bert"), dtype="float32", out=out, executor=ThreadExecutor(1)):
        pass
    file = out / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": False}))
    stored = read_manifest(out, Manifest)
    write_manifest(out, stored.model_copy(update={"model_files": record_files(out / "model")}))
    with pytest.raises(ParityError, match="makes other tokens of 'The quick"):
        load(out, dtype="float32", executor=ThreadExecutor(1))
