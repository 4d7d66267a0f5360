"""The model and the requests that everyone is measured on: BERT-base's shape, and pairs as long as MRPC's.

Random weights from a fixed seed, so that nothing is downloaded; a word of the vocabulary is one token, so that a text
has the length that was drawn for it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

WORDS = 28_991
PARAMETERS = 85.05e6  # of the twelve layers; embeddings are looked up, not multiplied


def flops(lengths: list[int]) -> float:
    """What a forward pass of rows of these lengths, without padding, multiplies and adds."""
    return sum(2 * PARAMETERS * n + 12 * 4 * n * n * 768 for n in lengths)


def lengths(count: int, seed: int = 0) -> list[int]:
    """Tokens of each row: normal, mean 53, deviation 15, clipped to 16-128."""
    rng = random.Random(seed)
    return [min(128, max(16, round(rng.gauss(53, 15)))) for _ in range(count)]


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of texts of those lengths, three special tokens included."""
    rng = random.Random(seed + 1)

    def text(words: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(words))

    return [(text((n - 3) // 2), text(n - 3 - (n - 3) // 2)) for n in lengths(count, seed)]


def singles(count: int, length: int, seed: int = 0) -> list[str]:
    """Single texts of ``length`` tokens, two special ones included."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(length - 2)) for _ in range(count)]


def batches(rows: int, count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """``count`` padded batches of ``rows`` rows: input_ids, attention_mask, token_type_ids, int64 ``[B, S]``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lengths(rows * count, seed)
    made = []
    for start in range(0, len(drawn), rows):
        sizes = drawn[start : start + rows]
        mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
        ids = torch.randint(5, WORDS, mask.shape, generator=generator) * mask
        made.append((ids, mask, torch.zeros_like(ids)))
    return made


@dataclass(frozen=True)
class Shape:
    """Of a BERT with random weights; its vocabulary is the special tokens and ``words``."""

    name: str
    words: int = WORDS
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072


BASE = Shape("bert-base")
MINI_LM = Shape("minilm-6", words=30_517, hidden=384, layers=6, feed_forward=1536)


def checkpoint(folder: Path, shape: Shape = BASE) -> Path:
    """The checkpoint's directory, made on first use."""
    directory = folder / f"{shape.name}-random"
    if (directory / "tokenizer.json").exists():
        return directory
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=shape.words + 5,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    vocabulary = directory / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary.write_text("\n".join([*special, *(f"w{i}" for i in range(shape.words))]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(directory)
    return directory
