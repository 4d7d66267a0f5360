"""Static shapes: the choice of buckets, padding to them, and a served model that has only them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import pad_id_of, rows
from tpray.artifacts.resolve import find_model
from tpray.config import ModelConfig
from tpray.errors import ConfigError, InputTooLongError
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms.topology import Topology
from tpray.runtime.buckets import Bucket, choose_lengths, fitting, largest_batch, pad_to, parse
from tpray.serving.local import load
from tpray.tokenizer import Item


def padding(lengths: list[int], chosen: list[int]) -> int:
    return sum(min(c for c in chosen if c >= n) - n for n in lengths)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("programs", [1, 2, 3, 4])
def test_the_chosen_lengths_waste_least(seed: int, programs: int) -> None:
    """Against every other choice of as many lengths."""
    rng = random.Random(seed)
    lengths = [rng.choice([3, 5, 8, 9, 15, 20, 21, 40]) for _ in range(30)]
    chosen = choose_lengths(lengths, programs)
    assert len(chosen) <= programs
    assert max(chosen) == max(lengths)
    every = itertools.combinations(sorted(set(lengths)), min(programs, len(set(lengths))))
    assert padding(lengths, chosen) == min(padding(lengths, list(c)) for c in every if max(c) == max(lengths))


def test_more_programs_than_lengths_are_not_made() -> None:
    assert choose_lengths([4, 4, 9], 5) == [4, 9]
    with pytest.raises(ConfigError, match="at least one"):
        choose_lengths([], 2)


def test_the_smallest_bucket_that_fits_is_taken() -> None:
    buckets = parse("8x32, 1x128,8x128")
    assert buckets == (Bucket(1, 128), Bucket(8, 32), Bucket(8, 128))
    assert fitting(buckets, 1, 20) == Bucket(1, 128)  # 128 tokens rather than 256
    assert fitting(buckets, 2, 20) == Bucket(8, 32)
    assert fitting(buckets, 2, 33) == Bucket(8, 128)
    assert fitting(buckets, 9, 1) is None
    assert largest_batch(buckets, 100) == 8
    with pytest.raises(InputTooLongError, match=r"129 tokens .* has 128"):
        largest_batch(buckets, 129)


@pytest.mark.parametrize("text", ["", "8", "8x", "0x16", "8x16x2", "axb", "8x16;1x2"])
def test_what_is_no_bucket_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="BATCHxLENGTH"):
        parse(text)


def test_added_rows_have_one_token() -> None:
    ids, mask, types = pad_to([np.array([[5, 6]]), np.array([[1, 1]]), np.array([[0, 1]])], Bucket(2, 4), 9)
    assert ids.tolist() == [[5, 6, 9, 9], [9, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert types.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_model_with_buckets_answers_as_one_without(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint(model_type)
    batch = rows([1, 33, 7, 64, 16], pad_id_of(directory))
    if model_type == "modernbert":
        batch[2][:] = 0  # it knows no token types
    named = dict(zip(("input_ids", "attention_mask", "token_type_ids"), batch, strict=True))
    texts: list[Item] = ["a", "b c d e f g h", ("a b", "c"), "z " * 15, "y " * 30]
    with load(directory, tp=2, dtype="float32", executor=ThreadExecutor(2)) as free:
        expected, scores = free.logits(**named), free.classify(texts)
    with load(directory, tp=2, dtype="float32", buckets="2x16,2x64", executor=ThreadExecutor(2)) as classifier:
        np.testing.assert_allclose(classifier.logits(**named), expected, atol=1e-5, rtol=0)
        for one, other in zip(classifier.classify(texts), scores, strict=True):
            assert [s["label"] for s in one] == [s["label"] for s in other]
            assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-5)
        with pytest.raises(InputTooLongError, match="64"):
            classifier.classify("x " * 70)


def test_auto_chooses_by_sample_texts(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tpray.commands.cli import app
    from tpray.commands.trace import auto_buckets

    samples = tmp_path / "samples.txt"
    samples.write_text("\n".join(["the firm"] * 9 + ["the firm is in the city of Paris and in Rome"] * 3))
    buckets = auto_buckets(None, samples, 2, 4)
    short, long = parse(buckets)
    assert (short.batch, long.batch) == (4, 4)
    assert short.length == 4  # two words and two special tokens
    assert long.length > 10
    refused = CliRunner().invoke(app, ["trace", "--buckets", "auto"])
    assert isinstance(refused.exception, ConfigError)
    assert "--samples" in str(refused.exception)


def test_buckets_that_cannot_be_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    for model_type, buckets, message in (("bert", "1x81", "81 .* 80"), ("convbert", "1x16", "padding")):
        model = ModelConfig(source=str(make_checkpoint(model_type)), buckets=parse(buckets))
        with pytest.raises(ConfigError, match=message):
            find_model(model, Topology(2))
