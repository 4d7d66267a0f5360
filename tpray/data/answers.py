"""Any number of items asked of a group, and what their records are given for the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpray.errors import ItemError
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.scores import OWN, RAW
from tpray.serving.tagging import Tagging

if TYPE_CHECKING:
    from tpray.serving.chunks import Chunks
    from tpray.serving.local import LocalClassifier


@dataclass(frozen=True)
class Asking:
    """How items are asked. raw: logits. chunks: how texts that are too long are read, if in chunks."""

    raw: bool = False
    truncate: bool = False
    chunks: Chunks | None = None


def asked(classifier: LocalClassifier, items: Iterable[Any], how: Asking) -> Iterator[list[dict[str, Any]] | ItemError]:
    """The labels of each item; where the model labels tokens, its entities, neighbours of one label together."""
    if classifier.task != TOKEN:
        return classifier.classify_each(items, RAW if how.raw else OWN, how.truncate, how.chunks)
    tagging = Tagging("none" if how.raw else "simple", raw_scores=how.raw, truncate=how.truncate)
    return classifier.tag_each(items, tagging)


def given(answer: list[dict[str, Any]] | ItemError, task: str, what: str) -> dict[str, Any]:
    """What a record is given for its answer; see `columns.ADDED`.

    Args:
        task: of the model. what: what an error calls the record, "row 3".
    """
    if isinstance(answer, ItemError):
        return {"error": answer.said_of(what)}
    if task == TOKEN:
        return {"entities": answer}
    return {"label": answer[0]["label"], "score": answer[0]["score"], "scores": answer}
