"""What a checkpoint says of reranking: which number is a document's score, and how a pair is written for the model.

As sentence-transformers' `CrossEncoder` reads it (6.2: cross_encoder/model.py, base/model.py,
base/modules/transformer.py):

- A folder that CrossEncoder saved has ``modules.json`` and names itself so in ``config_sentence_transformers.json``.
  There are the activation, and prompts: the default one stands before each query. ``sentence_bert_config.json`` limits
  the length of a row. Of other folders only config.json counts.
- The score of a single label is its logit's sigmoid, unless the activation is Identity:
  ``sentence_transformers.activation_fn``, or as versions before 4 wrote it ``sbert_ce_default_activation_function``.
  Behind a language model the module ``LogitScore`` makes one score of a word's logit, or of the difference of two.
- Where the tokenizer's chat template carries messages of the roles ``query`` and ``document``, a pair is that
  conversation, with the prompt as its system message.

Of two labels the second is the relevant one, as in Nogueira and Cho's BERT rerankers (Passage Re-ranking with BERT,
2019; pygaggle's `SequenceClassificationTransformerReranker`), and the score is its probability. CrossEncoder ranks
with one only.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tpray.artifacts.manifest import ModelRecord
from tpray.chat import Chat
from tpray.errors import InputError, InputTooLongError, TprayError, UnsupportedTaskError
from tpray.group.wire import Array
from tpray.parallel_layers.tasks import TEXT
from tpray.serving.chunks import WHOLE, Chunks
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.scores import Activation, sigmoid
from tpray.serving.token_codec import check_task
from tpray.tokenizer import Encoded, check_text

log = logging.getLogger(__name__)

ROLES = ("query", "document")
_SIGMOID, _IDENTITY = "Sigmoid", "Identity"
_OF_WORDS = "LogitScore"
"""CrossEncoder's module behind a language model, which is served by the words whose logits it takes."""


@dataclass(frozen=True)
class Relevance:
    """How one model scores documents for a query.

    labels: 1 or 2. activation: its class in torch, of a single label, or of the difference between two words where
    CrossEncoder saved it. prompt: before each query. max_length: tokens of
    a row. chat: a pair is a conversation.
    """

    labels: int
    activation: str
    prompt: str
    max_length: int
    chat: bool

    @classmethod
    def of(cls, directory: Path, codec: TextCodec) -> Relevance:
        """What the files in ``directory`` say of the model.

        Raises:
            UnsupportedTaskError: it is no reranker, or one that works in a way that tpray does not.
        """
        record, labels = codec.record, len(codec.record.labels)
        check_task(record, TEXT)
        if labels not in (1, 2):
            raise UnsupportedTaskError(
                f"{record.source} has {labels} labels ({_some(record.labels)}), and reranking takes a model with one, "
                "or with two of which the second is the relevant one: ask for /predict, or serve a reranker"
            )
        if labels == 2 and record.problem_type in ("regression", "multi_label_classification"):
            raise UnsupportedTaskError(
                f"{record.source} gives two values that do not exclude each other (problem_type {record.problem_type})"
                ", and of two labels reranking takes the second's probability: ask for /predict"
            )
        stored = partial(_stored, directory)
        own = stored("config_sentence_transformers.json")
        saved = (directory / "modules.json").is_file() and own.get("model_type") == "CrossEncoder"
        own, bert = (own, stored("sentence_bert_config.json")) if saved else ({}, {})
        of_words = saved and _check_modules(stored("modules.json"), record)
        if bert.get("do_lower_case") and not codec.ignores_case:
            raise UnsupportedTaskError(
                f"{record.source} has do_lower_case in sentence_bert_config.json and a tokenizer that heeds case: give "
                "the tokenizer a lower-casing normalizer"
            )
        prompt = _default_prompt(own, record)
        return cls(
            labels,
            _activation(own, stored("config.json"), record) if labels == 1 or of_words else "",
            prompt,
            min(codec.max_length, int(bert.get("max_seq_length") or codec.max_length)),
            _is_chat(codec, prompt, bert.get("modality_config") if saved else None),
        )

    def rows(
        self,
        codec: TextCodec,
        query: str,
        documents: Sequence[str],
        truncate: bool,
        direction: Direction | None,
        deadline: float,
        chunks: Chunks = WHOLE,
        max_rows: float = math.inf,
        max_length: int | None = None,
        document_tokens: int | None = None,
    ) -> list[list[Encoded]]:
        """The rows of the query with each document; of what is too long only the document is cut, or read in chunks.

        Args:
            max_length: tokens of a row; at most, and by default, the model's.
            document_tokens: of a document, those that are read; None: all for which there is room.

        Raises:
            UnsupportedTaskError: conversations are to be read in chunks, or documents cut that cannot be.
            InputError: the query, or a document, whose number it has.
            DeadlineError: ``deadline`` passed.
        """
        check_text(query, None, "the query ")
        for number, document in enumerate(documents):
            check_text(document, number)
        most = min(max_length or self.max_length, self.max_length)
        if document_tokens is not None and (self.chat or not codec.facts.templates):
            raise UnsupportedTaskError(
                f"{codec.record.source} has pairs that are not taken apart, so that documents are not cut by "
                "themselves: leave `max_tokens_per_doc` out, and shorten them"
            )
        if not self.chat:
            first, of_second = [self.prompt + query], math.inf if document_tokens is None else document_tokens
            return codec.encode_after(
                first, documents, most, truncate, direction, deadline, chunks, max_rows, of_second
            )
        if chunks != WHOLE:
            raise UnsupportedTaskError(
                f"{codec.record.source} has pairs written by its chat template, which are not read in chunks: leave "
                "`chunks` out, and shorten the documents"
            )
        try:
            rows = codec.encode([_chat(self.prompt, query, document) for document in documents], deadline=deadline)
        except InputTooLongError as e:
            raise self._not_cut(e.item, most) from e
        too_long = next((number for number, row in enumerate(rows) if len(row) > most), None)
        if too_long is not None:
            raise self._not_cut(too_long, most)
        return [[row] for row in rows]

    @staticmethod
    def _not_cut(number: int | None, most: int) -> InputTooLongError:
        return InputTooLongError(
            f"makes a conversation of more than {most} tokens, which a row may have; as the model's chat template "
            "writes it, it is not cut: shorten it",
            number,
        )

    def scores(self, logits: Array, activation: Activation | None = None) -> Array:
        """How relevant each row's document is: a probability, or whatever the activation makes of the logit.

        Args:
            logits: float32 ``[B, L]``, finite.
            activation: None: the checkpoint's. none: the logit; of two labels by how much the second one's is greater,
                in whose order the scores are too. Of that difference sigmoid is the second one's softmax.

        Raises:
            InputError: softmax of a single label.
        """
        if activation == "softmax" and self.labels == 1:
            raise InputError("this model has one label, whose softmax is always 1: ask for sigmoid, or none")
        values = logits.astype(np.float64)
        values = values[:, 0] if self.labels == 1 else values[:, 1] - values[:, 0]
        identity = activation == "none" or (activation is None and self.activation == _IDENTITY)
        return values if identity else sigmoid(values)


def _stored(directory: Path, name: str) -> Any:
    """What a JSON file holds; an empty object if it is not there."""
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UnsupportedTaskError(f"{name} of this model cannot be read, and may change its scores: {e}") from e


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")


def _check_modules(modules: Any, record: ModelRecord) -> bool:
    """Whether the score is the logit of a word, or by how much it is greater than another's, which is the head here.

    Raises:
        UnsupportedTaskError: the folder has further modules.
    """
    kinds = [str(each.get("type")) for each in modules]
    names = [kind.rpartition(".")[2] for kind in kinds]
    of_words = names == ["Transformer", _OF_WORDS]
    if names != ["Transformer"] and not of_words:
        further = ", ".join(kind for kind in kinds if not kind.endswith(".Transformer"))
        raise UnsupportedTaskError(
            f"{record.source} computes its scores with modules of sentence-transformers' behind the model "
            f"(modules.json: {further}), which tpray does not run: reranking takes a classifier's own head"
        )
    return of_words


def _activation(own: dict[str, Any], config: dict[str, Any], record: ModelRecord) -> str:
    newer = config.get("sentence_transformers")
    if isinstance(newer, dict) and "activation_fn" in newer:
        older = newer["activation_fn"]
    else:
        older = config.get("sbert_ce_default_activation_function")
    for path in (own.get("activation_fn"), older):
        if not path:
            continue
        if not str(path).startswith("torch."):  # code of the checkpoint's own, which CrossEncoder does not run either
            log.warning("%s: the activation %s is not torch's, and Sigmoid is taken for it", record.source, path)
            continue
        name = str(path).rpartition(".")[2]
        if name not in (_SIGMOID, _IDENTITY):
            raise UnsupportedTaskError(
                f"{record.source} scores with {path}, and reranking knows torch's Sigmoid and Identity: correct its "
                "activation_fn, or ask for /predict with raw_scores"
            )
        return name
    return _SIGMOID


def _default_prompt(own: dict[str, Any], record: ModelRecord) -> str:
    name, prompts = own.get("default_prompt_name"), own.get("prompts") or {}
    if name is None:
        return ""
    if name not in prompts:
        raise UnsupportedTaskError(
            f"{record.source}: default_prompt_name in config_sentence_transformers.json is {name!r}, and prompts has "
            f"{', '.join(prompts) or 'none'}: correct it"
        )
    return str(prompts[name] or "")


def _chat(prompt: str, query: str, document: str) -> Chat:
    system = ({"role": "system", "content": prompt},) if prompt else ()
    texts = zip(ROLES, (query, document), strict=True)
    return Chat((*system, *({"role": role, "content": text} for role, text in texts)))


def _is_chat(codec: TextCodec, prompt: str, modalities: Any) -> bool:
    """Whether pairs are conversations: the checkpoint says so, or says nothing and its template carries both roles."""
    if codec.facts.chat_template is None or (modalities is not None and "message" not in modalities):
        return False
    try:
        whole, *varied = codec.encode([_chat(prompt, *pair) for pair in (("a", "a"), ("b", "a"), ("a", "b"))])
    except InputError as e:
        failure: TprayError | str | None = e
    else:
        failure = "what they say does not reach the model" if whole in varied else None
    if failure is not None and modalities is not None:
        raise UnsupportedTaskError(
            f"{codec.record.source} has pairs rendered by its chat template (modality_config in "
            f"sentence_bert_config.json), and that does not carry the roles query and document ({failure}): give "
            "another with --chat-template"
        )
    return failure is None
