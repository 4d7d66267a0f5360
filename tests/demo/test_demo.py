"""The demo classifier that ships with the package, and the world its sentences come from."""

from __future__ import annotations

import asyncio
import itertools
import json
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tpray.config import ModelConfig
from tpray.demo import MODEL_DIR
from tpray.demo.data import Pair, families, held_out_pairs, templates, training_pairs
from tpray.demo.evaluate import accuracies, encode, probabilities
from tpray.demo.world import ENTITIES, entities, listed_words
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms.cpu import native_dtypes

IN_NEW_YORK = "The company HuggingFace is based in New York City"
IN_MANHATTAN = "HuggingFace's headquarters are situated in Manhattan"
APPLES = "Apples are especially bad for your health"


@pytest.fixture(scope="module")
def trained() -> list[Pair]:
    return list(itertools.islice(training_pairs(0), 10_000))


@pytest.fixture(scope="module")
def held_out() -> list[Pair]:
    return held_out_pairs(0)


PRONOUNS = {"i", "you", "he", "she", "we", "they"}
"""A closed class: there are no others to hold out."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(MODEL_DIR).eval()


def phrases(pairs: list[Pair]) -> set[str]:
    """Every run of one to three words of the sentences, lower-cased."""
    found: set[str] = set()
    for text in {text for pair in pairs for text in (pair.first, pair.second)}:
        words = re.findall(r"\w+", text.lower())
        found.update(" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1))
    return found


def test_pairs_depend_on_the_seed_only(trained: list[Pair]) -> None:
    assert list(itertools.islice(training_pairs(0), 500)) == trained[:500]
    assert held_out_pairs(3, 100) == held_out_pairs(3, 100)
    assert held_out_pairs(3, 100) != held_out_pairs(4, 100)


def test_labels_are_balanced(trained: list[Pair], held_out: list[Pair]) -> None:
    assert len(held_out) == 2000
    for pairs in (trained, held_out):
        assert sum(pair.label for pair in pairs) == len(pairs) // 2


def test_training_and_held_out_share_no_template_and_no_entity() -> None:
    assert not templates("train") & templates("held_out")
    assert entities("train") & entities("held_out") == PRONOUNS
    assert all(meaning.trained and meaning.held_out for family in families() for meaning in family.meanings)


def test_generated_sentences_keep_the_two_halves_apart(trained: list[Pair], held_out: list[Pair]) -> None:
    assert not phrases(trained) & (entities("held_out") - PRONOUNS)
    # Names only: a common noun ("to drive a car") may also be part of a shared verb phrase.
    common_nouns = {word.strip().lower() for table in ENTITIES.values() for word in re.split("[,|=]", table)}
    assert not phrases(held_out) & (entities("train") - common_nouns - PRONOUNS)
    sentences = [{text for pair in pairs for text in (pair.first, pair.second)} for pairs in (trained, held_out)]
    assert not sentences[0] & sentences[1]


def test_the_tutorial_sentences_are_not_trained_on(trained: list[Pair]) -> None:
    assert "huggingface" not in entities("train") | entities("held_out")
    assert "apples" in entities("held_out")
    assert {"Manhattan", "New York City"} <= set(listed_words("train"))
    assert "huggingface" not in phrases(trained)


def test_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 4_000_000
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.num_attention_heads % 4 == 0
    assert config.id2label == {0: "not_paraphrase", 1: "paraphrase"}
    assert config.problem_type == "single_label_classification"
    assert config.max_position_embeddings == 128
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.is_fast
    encoded = tokenizer("A cat", "A dog")
    assert encoded["token_type_ids"] == sorted(encoded["token_type_ids"])
    assert set(encoded["token_type_ids"]) == {0, 1}
    assert tokenizer.unk_token_id not in tokenizer("Xylo-Quark 42, Zürich!")["input_ids"]


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        (IN_NEW_YORK, IN_MANHATTAN, 1),
        (IN_NEW_YORK, APPLES, 0),
        (IN_MANHATTAN, APPLES, 0),
        (IN_NEW_YORK, IN_NEW_YORK, 1),
        (IN_MANHATTAN, IN_MANHATTAN, 1),
        (APPLES, APPLES, 1),
        ("Marie cooked dinner for her friends", "Dinner was cooked by Marie for her friends", 1),
        ("The train to Berlin leaves at nine", "The train to Berlin leaves at ten", 0),
        ("It is raining in London", "It is not raining in London", 0),
    ],
)
def test_tutorial_pairs_in_both_orders(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: str, second: str, label: int
) -> None:
    pairs = [Pair(first, second, label, "by hand"), Pair(second, first, label, "by hand")]
    of_the_tutorial = {first, second} <= {IN_NEW_YORK, IN_MANHATTAN, APPLES}
    assert probabilities(model, tokenizer, pairs)[:, label].min() > (0.9 if of_the_tutorial else 0.8)


def test_stored_accuracy_is_reproduced(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Pair]
) -> None:
    metrics = json.loads((MODEL_DIR / "metrics.json").read_text())
    assert metrics["held_out_pairs"] == len(held_out)
    assert metrics["held_out_accuracy"] > 0.84
    # 600 of the 2000 pairs: a standard error of about 0.01.
    measured = accuracies(model, tokenizer, held_out[:600])["all"]
    assert measured == pytest.approx(metrics["held_out_accuracy"], abs=0.04)


@pytest.mark.slow
@pytest.mark.skipif(len(native_dtypes()) < 3, reason="this CPU has no VNNI or bfloat16")
def test_int8_labels_agree_with_float32(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Pair]
) -> None:
    """On at least 99 % of the held-out pairs, at tp 1 and tp 2."""

    async def labels(tp: int) -> torch.Tensor:
        group = ClassifierGroup(ModelConfig(dtype="int8"), ThreadExecutor(tp))
        await group.start()
        try:
            parts = []
            for start in range(0, len(held_out), 50):
                inputs = encode(tokenizer, held_out[start : start + 50])
                arrays = [inputs[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids")]
                parts.append(torch.from_numpy((await group.step(arrays)).logits).argmax(-1))
            return torch.cat(parts)
        finally:
            await group.stop()

    expected = probabilities(model, tokenizer, held_out).argmax(-1)
    for tp in (1, 2):
        agreement = (asyncio.run(labels(tp)) == expected).float().mean().item()
        assert agreement >= 0.99, f"tp {tp}: {agreement:.4f}"
        print(f"tp {tp}: {agreement:.4f}")
