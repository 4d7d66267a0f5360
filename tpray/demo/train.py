"""Train the demo classifier from scratch: ``python -m tpray.demo.train``.

A BERT of about one million float32 parameters (4 layers, hidden size 128) learns from pairs that
``tpray.demo.data`` makes up as it goes; no text from anywhere else is used. The tokenizer is a WordPiece one,
trained on the same sentences. The held-out accuracy is measured on entities and phrasings never trained on.
The same seed and number of threads give the same pairs and (up to floating-point order) the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import string
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from . import MODEL_DIR
from .data import held_out_pairs, templates, training_pairs
from .evaluate import accuracies, encode
from .world import listed_words

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 2200
POSITIONS = 128
BATCH = 64
LEARNING_RATE = 1e-3
HINT_LAYER = 2  # whose output is asked which words the other sentence repeats
HELD_OUT_SEED = 0


def build_tokenizer(seed: int, sentences: int = 60_000) -> PreTrainedTokenizerFast:
    """An uncased WordPiece tokenizer for sentence pairs, trained on the training half of the world."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    characters = string.ascii_lowercase + string.digits
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(characters + string.punctuation),
        show_progress=False,
    )
    pairs = itertools.islice(training_pairs(seed), sentences // 2)
    # Every character must also be known inside a word, so that no name is ever unknown.
    spelled = [first + second for first in characters for second in characters]
    said = (text for pair in pairs for text in (pair.first, pair.second))
    # Words of the tables are repeated, so that invented names do not crowd them out of the vocabulary.
    listed = (sorted(templates("train")) + listed_words("train")) * 300
    tokenizer.train_from_iterator(itertools.chain(said, listed, spelled), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def build_model(vocabulary: int) -> BertForSequenceClassification:
    """The untrained classifier."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,  # no pair is seen twice, there is nothing to overfit
        attention_probs_dropout_prob=0.0,
        id2label={0: "not_paraphrase", 1: "paraphrase"},
        label2id={"not_paraphrase": 0, "paraphrase": 1},
        problem_type="single_label_classification",
        dtype="float32",
    )
    # With the eager attention autocast takes half the time; the saved checkpoint does not name it.
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager")
    prime_attention(model)
    return model


@torch.no_grad()
def prime_attention(model: BertForSequenceClassification) -> None:
    """Let heads start by attending to a token's neighbours or to its copies in the other sentence.

    That is most of what comparing two sentences needs: the same words, in the same order. Found by chance, it
    takes many thousands of steps; everything remains trainable.
    """
    size, heads = model.config.hidden_size, model.config.num_attention_heads
    rates = torch.linspace(0.05, 3.1, size // 2)
    angles = torch.arange(POSITIONS)[:, None] * rates
    model.bert.embeddings.position_embeddings.weight.copy_(0.03 * torch.cat([angles.sin(), angles.cos()], dim=1))
    sine, cosine = rates.sin().diag(), rates.cos().diag()
    to_previous = torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])  # [size, size]
    side = nn.functional.normalize(torch.randn(size), dim=0)  # the direction that tells the two sentences apart
    model.bert.embeddings.token_type_embeddings.weight.copy_(0.12 * torch.stack([side, -side]))
    copies = torch.eye(size) - 2 * torch.outer(side, side)
    for depth, layer in enumerate(model.bert.encoder.layer):
        query = layer.attention.self.query.weight.view(heads, -1, size)
        key = layer.attention.self.key.weight.view(heads, -1, size)
        for head, sought in enumerate((to_previous, to_previous.T, copies, copies) if depth == 0 else (copies, copies)):
            nn.init.normal_(key[head], std=0.15)
            query[head] = key[head] @ sought


def repeated(inputs: dict[str, Tensor]) -> Tensor:
    """For every token, whether the other sentence contains it [..., 0], and whether it does so after the same
    neighbour [..., 1]: a float tensor [pairs, positions, 2]."""
    ids, types = inputs["input_ids"], inputs["token_type_ids"]
    other = (types[:, :, None] != types[:, None, :]) & (inputs["attention_mask"][:, None, :] == 1)
    same = (ids[:, :, None] == ids[:, None, :]) & other
    same_neighbours = same & nn.functional.pad(same, (1, 0, 1, 0))[:, :-1, :-1]
    return torch.stack([same.any(dim=2), same_neighbours.any(dim=2)], dim=-1).float()


def batches(tokenizer: Any, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Endless batches of pairs of similar length: inputs [BATCH, positions] and labels [BATCH]."""
    source = training_pairs(seed)
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        pool = sorted(itertools.islice(source, 32 * BATCH), key=lambda pair: len(pair.first) + len(pair.second))
        for index in torch.randperm(32, generator=shuffle).tolist():
            pairs = pool[index * BATCH : (index + 1) * BATCH]
            yield encode(tokenizer, pairs), torch.tensor([pair.label for pair in pairs])


def train(model: BertForSequenceClassification, tokenizer: Any, seed: int, steps: int, console: Console) -> None:
    """Train ``model`` in place."""
    hint = nn.Linear(model.config.hidden_size, 2)  # only helps training along; it is not kept
    parameters = [*model.parameters(), *hint.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(400, steps // 10), steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    model.train()
    loss_average, accuracy = 0.7, 0.5
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step, (inputs, labels) in enumerate(itertools.islice(batches(tokenizer, seed), steps), start=1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(**inputs, labels=labels, output_hidden_states=True)
            hints = hint(output.hidden_states[HINT_LAYER].float())
            hint_loss = nn.functional.binary_cross_entropy_with_logits(
                hints, repeated(inputs), weight=inputs["attention_mask"][..., None].float()
            )
            (output.loss + 0.5 * hint_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss_average += 0.02 * (output.loss.item() - loss_average)
            accuracy += 0.02 * ((output.logits.argmax(-1) == labels).float().mean().item() - accuracy)
            progress.update(task, advance=1, description=f"loss {loss_average:.3f}, accuracy {accuracy:.3f}")
            if step % 250 == 0:
                console.print(f"step {step}: loss {loss_average:.3f}, accuracy {accuracy:.3f} on the training stream")
    model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate and save; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m tpray.demo.train", description="Train the demo classifier.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: the packaged model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7500, help=f"batches of {BATCH} pairs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    started = time.perf_counter()
    tokenizer = build_tokenizer(options.seed)
    model = build_model(len(tokenizer))
    train(model, tokenizer, options.seed, options.steps, console)
    seconds = time.perf_counter() - started

    held_out = held_out_pairs(HELD_OUT_SEED)
    accuracy = accuracies(model, tokenizer, held_out)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    metrics = {
        "held_out_accuracy": accuracy["all"],
        "held_out_pairs": len(held_out),
        "held_out_seed": HELD_OUT_SEED,
        "held_out_accuracy_by_kind": accuracy,
        "parameters": model.num_parameters(),
        "seed": options.seed,
        "steps": options.steps,
        "batch": BATCH,
        "threads": options.threads,
        "train_seconds": round(seconds),
        "torch": torch.__version__,
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    console.print(accuracy)
    pairs = f"{len(held_out)} pairs, unseen entities and unseen templates"
    console.print(f"held-out accuracy: {accuracy['all']:.3f} ({pairs})")


if __name__ == "__main__":
    main()
