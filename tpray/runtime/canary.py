"""Fixed inputs and texts whose unsharded logits are known, so that a wrong shard or tokenizer is found at the start.

A group is asked them again while it serves, so that a weight that changed in memory, or a core that computes wrongly,
is found too. What no canary sees: the rows of embeddings that its own tokens and positions do not use, a fault of which
nothing is left in the logits, and one that was there at the start and is smaller than what the dtype explains.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tpray.errors import ParityError
from tpray.runtime.records import INPUT_NAMES, Canary, TextCanary
from tpray.tokenizer import Encoded, longest_row, pad, sample_items, stock_rows, takes_types

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tpray.parallel_layers.checkpoint import Checkpoint

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 2e-1}
"""Largest difference from the unsharded float32 logits, as a share of the largest of them (or of 1).

In float32 only the order of additions differs, about 1e-6; bfloat16 rounds each of some 2 x layers sums to
8 bits, about 1e-2; int8 keeps 7 bits below the largest of each token and channel. A rank's missing or doubled
part moves logits by their own size.
"""


READS_PADDING = 1e-4
"""A row whose logits change by a larger share of the largest logit when it is padded is taken to read its padding."""

LARGE_BYTES = 1 << 28
"""A larger checkpoint is not read whole, but layer by layer, each time the unsharded model is asked."""

Array = npt.NDArray[Any]


def make_canary(checkpoint: Checkpoint, max_length: int) -> Canary:
    """Run the stock transformers model, unsharded and in float32: on seeded rows with padding, and on texts.

    Each padded row is run by itself too, which shows whether the model reads padding, whatever its configuration.
    """
    if checkpoint.size_bytes > LARGE_BYTES:
        from tpray.parallel_layers.shard import streamed_model

        try:
            return _ask(checkpoint, streamed_model(checkpoint), max_length)
        except (NotImplementedError, RuntimeError) as e:  # says torch of weights that are not there
            log.info("%s is read whole: %s", checkpoint.source, str(e).splitlines()[0])
    from tpray.runtime.stock import stock_model

    return _ask(checkpoint, stock_model(checkpoint), max_length)


def _ask(checkpoint: Checkpoint, model: nn.Module, max_length: int) -> Canary:
    import torch

    from tpray.parallel_layers.shard import ShardedClassifier

    config = checkpoint.config
    tokenizer = checkpoint.tokenizer
    stock = ShardedClassifier(model, takes_types(tokenizer))
    inputs = _inputs(config, checkpoint.pad_id, max_length)
    lengths = inputs[1].sum(dim=1).tolist()
    with torch.no_grad():
        logits = stock(*inputs).flatten(1)
        rows = [stock(*(x[i : i + 1, :length] for x in inputs)).flatten() for i, length in enumerate(lengths)]
        alone = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # where tokens have logits, padding has zeros
        texts = tuple(_texts(checkpoint, model, max_length))
    change = (logits - alone).abs().max() / logits.abs().max().clamp(min=1.0)
    ids, mask, types = (tuple(map(tuple, t.tolist())) for t in inputs)
    return Canary(
        input_ids=ids,
        attention_mask=mask,
        token_type_ids=types,
        logits=tuple(map(tuple, logits.tolist())),
        texts=texts,
        reads_padding=checkpoint.mixes_lengths or not change.item() <= READS_PADDING,
    )


def _texts(checkpoint: Checkpoint, model: nn.Module, max_length: int) -> Iterator[TextCanary]:
    """What stock tokenizer and model make of a few texts, each by itself; those that they cannot take are left out."""
    import torch

    tokenizer = checkpoint.tokenizer
    length = longest_row(tokenizer, max_length)
    accepted = inspect.signature(model.forward).parameters
    for item in sample_items(tokenizer):
        (row,) = stock_rows(tokenizer, [item], length)
        texts = (item,) if isinstance(item, str) else item
        inputs = {"input_ids": torch.tensor([row.ids]), "attention_mask": torch.ones((1, len(row)), dtype=torch.int64)}
        if takes_types(tokenizer):
            inputs["token_type_ids"] = torch.tensor([row.types])
        if not row.ids or max(row.ids) >= checkpoint.config.vocab_size:
            continue
        try:
            made = model(**{name: value for name, value in inputs.items() if name in accepted})
        except (IndexError, RuntimeError):  # token types that the embedding lacks
            continue
        logits = tuple(made.logits.float().flatten().tolist())
        yield TextCanary(texts=texts, ids=tuple(row.ids), types=tuple(row.types), logits=logits)


def _inputs(config: Any, pad_id: int, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, token_type_ids, int64 ``[3, S]``; three rows of different lengths."""
    import torch

    vocabulary: int = config.vocab_size
    length = min(24, max_length)
    generator = torch.Generator().manual_seed(20)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, used in enumerate((length, max(1, length * 3 // 4), min(3, length))):
        mask[row, used:] = 0
        if config.is_encoder_decoder:
            ids[row, used - 1] = config.eos_token_id
    ids[mask == 0] = pad_id
    types = torch.zeros_like(ids)
    types[:, length // 2 :] = 1
    return ids, mask, types * mask


def canary_steps(canary: Canary, pad_id: int) -> Iterator[tuple[list[Array], Array]]:
    """The steps of a check: a program's inputs, int64 ``[B, S]`` each, and the logits that must come out (`Canary`)."""
    yield [np.array(getattr(canary, name), dtype=np.int64) for name in INPUT_NAMES], _array(canary.logits)
    together = canary.texts and not canary.reads_padding
    for texts in [canary.texts] if together else [(text,) for text in canary.texts]:
        rows = [Encoded(list(text.ids), list(text.types)) for text in texts]
        width = max(len(text.logits) for text in texts)
        yield list(pad(rows, pad_id)), _array([text.logits + (0.0,) * (width - len(text.logits)) for text in texts])


def check_logits(reference: Array, logits: Array, dtype: str) -> float:
    """Compare a group's logits with the unsharded ones; the largest relative difference is returned.

    Raises:
        ParityError: it is larger than the dtype explains, or there is a NaN.
    """
    if not np.isfinite(reference).all():
        raise ParityError("the unsharded model's own logits are not finite (NaN or infinite): its weights are damaged")
    found = difference(reference, logits)
    if not found <= TOLERANCE[dtype]:  # also refuses NaN
        raise ParityError(
            f"the sharded {dtype} logits differ from the unsharded model's by {found:.2e}, more than "
            f"{TOLERANCE[dtype]:.0e}: the group must not serve; trace the model again"
        )
    return found


def difference(reference: Array, logits: Array) -> float:
    """The largest difference between logits, as a share of the largest of ``reference`` or of 1; or NaN.

    Of a classifier of tokens those of a row may lie one behind another, as in a `Canary`.
    """
    return float(np.abs(logits.reshape(reference.shape) - reference).max() / max(1.0, float(np.abs(reference).max())))


def _array(logits: Any) -> Array:
    return np.array(logits, dtype=np.float32)
