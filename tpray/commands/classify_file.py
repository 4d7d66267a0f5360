"""A file in, a file of the same kind out: every record in its place, with its labels or its error, none lost."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tpray.commands.console import duration
from tpray.commands.records import Reader, Record, deliver, open_reader, open_writer, partial_file
from tpray.data.answers import Asking, asked, given
from tpray.data.columns import Columns
from tpray.errors import InputError, ItemError
from tpray.tokenizer import Item

if TYPE_CHECKING:
    from tpray.serving.local import LocalClassifier

LOG_EVERY_S = 10.0
"""How often progress is a line, where there is no terminal."""
SHOW_EVERY_S = 0.2
"""How often it is renewed on a terminal."""


@dataclass
class Counts:
    """What became of the records. refused: the numbers of those, from 1. kept: how many an earlier run had written."""

    unit: str = "line"
    classified: int = 0
    refused: list[int] = field(default_factory=list)
    kept: int = 0

    def __str__(self) -> str:
        said = f"{self.classified} classified, {len(self.refused)} refused"
        if self.refused:
            shown = ", ".join(map(str, self.refused[:10])) + (", ..." if len(self.refused) > 10 else "")
            said += f" ({self.unit}{'s' if len(self.refused) > 1 else ''} {shown})"
        return said + (f"; {self.kept} {self.unit}s were done before" if self.kept else "")


@dataclass(frozen=True)
class _Read:
    """A record as it was read. item: None where it was refused, and error says why; or where it is blank."""

    number: int
    record: Record
    item: Item | None = None
    error: str = ""


@dataclass(frozen=True)
class How(Asking):
    """How a file is classified."""

    columns: Columns = field(default_factory=Columns)
    resume: bool = False


def classify_file(
    classifier: LocalClassifier,
    source: str,
    target: str | None,
    console: Console,
    how: How | None = None,
    shown: Callable[[Console, Reader], Shown] | None = None,
) -> Counts:
    """Classify every record of ``source`` (``-`` is standard input) into ``target`` (None is standard output).

    A record has a text and perhaps its pair, or, of JSON lines and Parquet, ``messages``; all that it has is kept, and
    ``label``, ``score`` and ``scores`` are added, or ``error`` where it cannot be classified; see `records.ADDED`.
    Where the model labels tokens, ``entities`` are added. A blank line stays blank.

    Args:
        shown: how far it is; the default is `Progress`.

    Raises:
        ConfigError: the file cannot be read, or the partial file is not of this source.
        StoreError: a URL cannot be read or written.
    """
    how = how or How()
    with ExitStack() as stack:
        reader = open_reader(source, how.columns, stack)
        writer = open_writer(reader, target, stack)
        counts, records = Counts(reader.unit), iter(reader)
        if how.resume:
            counts.kept = writer.resume(records)
        progress = stack.enter_context((shown or Progress)(console, reader))
        try:
            read = _read(records, reader.unit, classifier, how, counts.kept + 1)
            for each, added, refused in _answers(classifier, read, reader.unit, how):
                writer.write(each.record, added, each.number)
                if refused:
                    counts.refused.append(each.number)
                counts.classified += each.item is not None and not refused
                progress.advance()
            complete = writer.finish()
        except BaseException:
            if target is not None:
                said = f"{partial_file(target)} has the {reader.unit}s that are done: go on with --resume"
                console.print(said, highlight=False, soft_wrap=True)
            raise
    if target is not None and complete is not None:
        deliver(complete, target)
    return counts


def read_texts(source: str, columns: Columns) -> tuple[str, list[tuple[int, str]]]:
    """What a record of ``source`` is called, and the text of each that is not blank, with its number from 1.

    Raises:
        InputError: a record has none, or is a pair.
    """
    found = []
    with ExitStack() as stack:
        reader = open_reader(source, columns, stack)
        for number, record in enumerate(reader, start=1):
            if record is None:
                continue
            try:
                if isinstance(record, InputError):
                    raise record
                item = columns.item(record)
                if not isinstance(item, str):
                    raise InputError("is a pair or a conversation, and a document is a text alone", number)
            except InputError as e:
                raise type(e)(e.said_of(f"{reader.unit} {number}")) from e
            found.append((number, item))
    return reader.unit, found


class Shown(AbstractContextManager["Shown"], ABC):
    """Shows, within a ``with`` block, how far a file is."""

    @abstractmethod
    def advance(self) -> None:
        """One more record is done."""


class Progress(Shown):
    """How many records are done, how fast, and how long it will take; within a ``with`` block."""

    def __init__(self, console: Console, reader: Reader) -> None:
        self._console, self._reader = console, reader
        self._status = console.status("Classifying") if console.is_terminal else None
        self._started = self._shown = time.monotonic()
        self._done, self._share = 0, reader.share()

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < (LOG_EVERY_S if self._status is None else SHOW_EVERY_S):
            return
        self._shown = now
        if self._status is not None:
            self._status.update(self.said(now - self._started))
        else:
            self._console.print(self.said(now - self._started), highlight=False, soft_wrap=True)

    def said(self, seconds: float) -> str:
        """After so many seconds."""
        return said_of(self._done, f"{self._reader.unit}s", seconds, self._share, self._reader.share())


def said_of(done: int, units: str, seconds: float, first: float | None, share: float | None) -> str:
    """How many are done, how fast, and how long it will take.

    Args:
        first, share: of the whole that was done at first and is done after so many seconds, from 0 to 1, where known.
    """
    text = f"{done} {units}, {done / max(seconds, 1e-9):.0f} a second"
    if share is None or first is None or share <= first:
        return text
    return f"{text}, {share:.0%}, {duration(seconds * (1 - share) / (share - first))} left"


def _answers(
    classifier: LocalClassifier, read: Iterator[_Read], unit: str, how: How
) -> Iterator[tuple[_Read, dict[str, Any], bool]]:
    """The records in their order, with what to add to each, and whether it was refused."""
    waiting: deque[_Read] = deque()

    def items() -> Iterator[Item]:
        for each in read:
            waiting.append(each)
            if each.item is not None:
                yield each.item

    for answer in asked(classifier, items(), how):
        while waiting[0].item is None:
            yield _unanswered(waiting.popleft())
        each = waiting.popleft()
        yield each, given(answer, classifier.task, f"{unit} {each.number}"), isinstance(answer, ItemError)
    yield from map(_unanswered, waiting)


def _unanswered(each: _Read) -> tuple[_Read, dict[str, Any], bool]:
    return each, {"error": each.error} if each.error else {}, bool(each.error)


def _read(records: Iterator[Record], unit: str, classifier: LocalClassifier, how: How, first: int) -> Iterator[_Read]:
    for number, record in zip(itertools.count(first), records):
        if record is None:
            yield _Read(number, None)
            continue
        try:
            if isinstance(record, InputError):
                raise record
            item = how.columns.item(record)
            classifier.check(item, how.truncate, how.chunks)
        except InputError as e:
            yield _Read(number, record, error=e.said_of(f"{unit} {number}"))
        else:
            yield _Read(number, record, item)
