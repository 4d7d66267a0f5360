"""What is written down of a traced program: the tensors that go in and come out, and a fixed input with its answer."""

from __future__ import annotations

from tpray.config import Frozen

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""Of a classifier's program, in their order."""


class TensorRecord(Frozen):
    """A tensor that goes into a program or comes out of it; dtype by torch's name for it (float32, say)."""

    dtype: str
    shape: tuple[int, ...]


class ProgramRecord(Frozen):
    """One program of a user's own model: it takes inputs of these shapes and no others."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


class TextCanary(Frozen):
    """A text or pair, what transformers' tokenizer makes of it, and the logits that its model then gives."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    types: tuple[int, ...]
    logits: tuple[float, ...]


class Canary(Frozen):
    """Inputs int64 ``[B, S]`` and the logits ``[B, L]`` that the unsharded float32 model gives for them.

    Of a classifier of tokens a row has those of all its tokens, one behind another ``[B, S * L]``, zeros for padding.
    texts: the same from text, each by itself. reads_padding: whether a row's logits depend on its padding.
    """

    input_ids: tuple[tuple[int, ...], ...]
    attention_mask: tuple[tuple[int, ...], ...]
    token_type_ids: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]
    texts: tuple[TextCanary, ...] = ()
    reads_padding: bool = False
