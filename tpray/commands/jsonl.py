"""A JSONL file in, a JSONL file out: one object a line, in order, none lost."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpray.errors import InputError
from tpray.serving.codec import Item

if TYPE_CHECKING:
    from tpray.serving.local import LocalClassifier


@dataclass
class Counts:
    """What became of the lines."""

    classified: int = 0
    refused: int = 0


@dataclass(frozen=True)
class _Line:
    number: int
    record: dict[str, Any]
    item: Item | None  # None: the line was refused, and record says why


def classify_file(
    classifier: LocalClassifier,
    source: Path,
    target: Path | None,
    raw: bool,
    truncate: bool,
    console: Console,
) -> Counts:
    """Classify every line of ``source`` (``-`` is standard input) into ``target`` (None is standard output).

    A line is an object with ``text`` and perhaps ``text_pair``; all its keys are kept, and ``label``,
    ``score`` and ``scores`` are added, or ``error`` where the line cannot be classified. ``target`` is
    written under another name first and appears when it is complete.
    """
    counts = Counts()
    with ExitStack() as stack:
        reader = (
            sys.stdin
            if str(source) == "-"
            else stack.enter_context(source.open(encoding="utf-8", errors="surrogateescape"))
        )
        partial = target.with_name(f".{target.name}.partial") if target else None
        writer: TextIO = stack.enter_context(partial.open("w", encoding="utf-8")) if partial else sys.stdout
        total = None if str(source) == "-" else _count_lines(source)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        bar = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = bar.add_task("Classifying", total=total)
        for record, refused in _answers(classifier, _read(reader, classifier, truncate), raw, truncate):
            writer.write(_dump(record) + "\n")
            counts.refused += refused
            counts.classified += not refused
            bar.advance(task)
    if partial is not None and target is not None:
        os.replace(partial, target)
    return counts


def _answers(
    classifier: LocalClassifier, lines: Iterator[_Line], raw: bool, truncate: bool
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Records to write, in the order of the lines, refused ones among them."""
    waiting: deque[_Line] = deque()

    def items() -> Iterator[Item]:
        for line in lines:
            waiting.append(line)
            if line.item is not None:
                yield line.item

    for scores in classifier.classify_many(items(), raw, truncate):
        while waiting[0].item is None:
            yield waiting.popleft().record, True
        best = {"label": scores[0]["label"], "score": scores[0]["score"]}
        yield waiting.popleft().record | best | {"scores": scores}, False
    while waiting:
        yield waiting.popleft().record, True


def _read(reader: TextIO, classifier: LocalClassifier, truncate: bool) -> Iterator[_Line]:
    for number, text in enumerate(reader, start=1):
        if not text.strip():
            continue
        record: dict[str, Any] = {"line": number}
        try:
            record = _parse(text)
            item = _item(record)
            classifier.check(item, truncate)
        except InputError as e:
            yield _Line(number, record | {"error": e.said_of(f"line {number}")}, None)
        else:
            yield _Line(number, record, item)


def _parse(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as e:
        raise InputError(f"not valid JSON: {e}") from e
    if not isinstance(record, dict):
        raise InputError("a line must be a JSON object with a text")
    return record


def _item(record: dict[str, Any]) -> Item:
    text, second = record.get("text"), record.get("text_pair")
    if not isinstance(text, str) or not isinstance(second, str | None):
        raise InputError('a line needs a "text", and may have a "text_pair"; both are strings')
    return text if second is None else (text, second)


def _dump(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a refused line with half a surrogate pair or broken UTF-8: kept, escaped
        return json.dumps(record)
    return text


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
