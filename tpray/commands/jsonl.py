"""A JSONL file in, a JSONL file out: one object a line, in order, none lost.

What is written goes to a partial file first, ``.NAME.partial`` beside the target, which takes the target's name when it
is complete. A run that was interrupted goes on from there.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpray.chat import Chat
from tpray.errors import ConfigError, InputError, ItemError
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.scores import OWN, RAW
from tpray.serving.tagging import Tagging
from tpray.tokenizer import Item

if TYPE_CHECKING:
    from tpray.serving.chunks import Chunks
    from tpray.serving.local import LocalClassifier

STANDARD_INPUT = Path("-")
ADDED = ("label", "score", "scores", "entities", "error")
"""What a line is given. Where it has one of these already, all of them get the prefix ``tpray_``."""


@dataclass
class Counts:
    """What became of the lines. refused: the numbers of those, from 1. kept: how many an earlier run had written."""

    classified: int = 0
    refused: list[int] = field(default_factory=list)
    kept: int = 0

    def __str__(self) -> str:
        said = f"{self.classified} classified, {len(self.refused)} refused"
        if self.refused:
            shown = ", ".join(map(str, self.refused[:10])) + (", ..." if len(self.refused) > 10 else "")
            said += f" (line{'s' if len(self.refused) > 1 else ''} {shown})"
        return said + (f"; {self.kept} lines were done before" if self.kept else "")


@dataclass(frozen=True)
class _Line:
    """A line of the input. record: None where it is blank. item: None where it was refused; error says why."""

    number: int
    record: dict[str, Any] | None
    item: Item | None = None
    error: str = ""

    def answered(self, **added: Any) -> str:
        """The line to write: all that was there, and what is added."""
        if self.record is None:
            return ""
        prefix = ""
        while any(prefix + name in self.record for name in ADDED):
            prefix += "tpray_"
        return _dump(self.record | {prefix + name: value for name, value in added.items()})


def partial_file(target: Path) -> Path:
    """Where the lines for ``target`` are until it is complete."""
    return target.with_name(f".{target.name}.partial")


def check_files(source: Path, target: Path | None, resume: bool) -> None:
    """Refuse, before anything is started, what cannot be read or written.

    Raises:
        ConfigError: there is no such file or folder, it is a table and not JSON lines, or an earlier run was
            interrupted.
    """
    if source != STANDARD_INPUT:
        if not source.is_file():
            raise ConfigError(f"there is no file {source}")
        with source.open(encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
        if first and not first.lstrip().startswith("{") and (source.suffix in (".csv", ".tsv") or _is_table(first)):
            raise ConfigError(
                f"{source} looks like a table (CSV), and its first line is not a JSON object: write one object with a "
                '"text" in each line, as pandas does with to_json(..., orient="records", lines=True)'
            )
    if target is None:
        if resume:
            raise ConfigError("--resume goes on with the file that --out names: name it")
        return
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {target.absolute().parent} to write {target.name} in")
    partial = partial_file(target)
    if partial.exists() and not resume:
        raise ConfigError(
            f"{partial} is left from a run that was interrupted: go on with it with --resume, or remove it"
        )
    if resume and source == STANDARD_INPUT:
        raise ConfigError("--resume reads its input again from the start: name a file with --in")


def _is_table(line: str) -> bool:
    """Whether a line that is not an object looks like the header of a table."""
    return any(len(line.split(mark)) > 1 and "text" in line.lower() for mark in (",", "\t", ";"))


def classify_file(
    classifier: LocalClassifier,
    source: Path,
    target: Path | None,
    raw: bool,
    truncate: bool,
    console: Console,
    resume: bool = False,
    chunks: Chunks | None = None,
) -> Counts:
    """Classify every line of ``source`` (``-`` is standard input) into ``target`` (None is standard output).

    A line is an object with ``text`` and perhaps ``text_pair``, or with ``messages``; all its keys are kept, and
    ``label``, ``score`` and ``scores`` are added, or ``error`` where the line cannot be classified; see `ADDED`. Where
    the model labels tokens, ``entities`` are added. A blank line stays blank.

    Args:
        resume: go on after the lines that an interrupted run has written.
        chunks: how texts that are too long are read, if in chunks.

    Raises:
        ConfigError: the partial file is not of this source.
    """
    counts = Counts()
    with ExitStack() as stack:
        reader = _reader(source, stack)
        partial = partial_file(target) if target else None
        if resume and partial is not None and partial.exists():
            counts.kept = _skip(reader, partial)
        writer: TextIO = stack.enter_context(partial.open("a", encoding="utf-8")) if partial else sys.stdout
        total = None if source == STANDARD_INPUT else _count_lines(source)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        bar = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = bar.add_task("Classifying", total=total, completed=counts.kept)
        lines = _read(reader, classifier, truncate, chunks, counts.kept + 1)
        try:
            for line, text, refused in _answers(classifier, lines, raw, truncate, chunks):
                writer.write(text + "\n")
                if refused:
                    counts.refused.append(line.number)
                counts.classified += line.item is not None and not refused
                bar.advance(task)
        except BaseException:
            if partial is not None:
                console.print(
                    f"{partial} has the lines that are done: go on with --resume", highlight=False, soft_wrap=True
                )
            raise
    if partial is not None and target is not None:
        os.replace(partial, target)
    return counts


def read_texts(source: Path) -> list[tuple[int, str]]:
    """The ``text`` of each line that is not blank (``-`` is standard input), with its number from 1.

    Raises:
        InputError: a line has none.
    """
    found = []
    with ExitStack() as stack:
        for number, line in enumerate(_reader(source, stack), start=1):
            if not line.strip():
                continue
            try:
                item = _item(_parse(line))
                if not isinstance(item, str):
                    raise InputError('is a pair or a conversation, and a document is a "text" alone', number)
            except InputError as e:
                where = f"line {number}"
                raise InputError(f"{where}: {e.message}" if e.item is None else e.said_of(where)) from e
            found.append((number, item))
    return found


def _reader(source: Path, stack: ExitStack) -> TextIO:
    """Lines of text; open as long as ``stack`` is."""
    # What is not UTF-8 becomes half a surrogate pair, and its line is refused; a byte order mark is not text.
    if source == STANDARD_INPUT:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", errors="surrogateescape")
    return stack.enter_context(source.open(encoding="utf-8-sig", errors="surrogateescape"))


def _skip(reader: TextIO, partial: Path) -> int:
    """Skip the lines of ``reader`` whose answers are in ``partial``, which loses a line that was not written whole.

    Raises:
        ConfigError: the last of them is not an answer to that line.
    """
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    partial.write_bytes(whole)
    answers = whole.decode("utf-8", errors="surrogateescape").splitlines()
    asked = ""
    for _ in answers:
        asked = reader.readline()
    try:
        wanted = json.loads(asked) if asked.strip() else {}
        found = json.loads(answers[-1]) if answers and answers[-1].strip() else {}
        same = not isinstance(wanted, dict) or wanted.items() <= found.items()
    except ValueError:  # a line that was refused because it is not JSON
        same = bool(asked)
    if not same:
        raise ConfigError(f"{partial} is not of this input: its line {len(answers)} answers another text; remove it")
    return len(answers)


def _answers(
    classifier: LocalClassifier, lines: Iterator[_Line], raw: bool, truncate: bool, chunks: Chunks | None
) -> Iterator[tuple[_Line, str, bool]]:
    """The lines in their order, with what to write for each, and whether it was refused."""
    waiting: deque[_Line] = deque()

    def items() -> Iterator[Item]:
        for line in lines:
            waiting.append(line)
            if line.item is not None:
                yield line.item

    for answer in _asked(classifier, items(), raw, truncate, chunks):
        while waiting[0].item is None:
            yield _unanswered(waiting.popleft())
        line = waiting.popleft()
        if isinstance(answer, ItemError):
            yield line, line.answered(error=answer.said_of(f"line {line.number}")), True
        elif classifier.task == TOKEN:
            yield line, line.answered(entities=answer), False
        else:
            best = answer[0]
            yield line, line.answered(label=best["label"], score=best["score"], scores=answer), False
    for line in waiting:
        yield _unanswered(line)


def _asked(
    classifier: LocalClassifier, items: Iterator[Any], raw: bool, truncate: bool, chunks: Chunks | None
) -> Iterator[list[dict[str, Any]] | ItemError]:
    """The labels of each item; where the model labels tokens, its entities, neighbours of one label together."""
    if classifier.task != TOKEN:
        return classifier.classify_each(items, RAW if raw else OWN, truncate, chunks)
    how = Tagging("none" if raw else "simple", raw_scores=raw, truncate=truncate)
    return classifier.tag_each(items, how)


def _unanswered(line: _Line) -> tuple[_Line, str, bool]:
    return line, line.answered(error=line.error), line.record is not None


def _read(
    reader: Iterable[str], classifier: LocalClassifier, truncate: bool, chunks: Chunks | None, first: int
) -> Iterator[_Line]:
    for number, text in enumerate(reader, start=first):
        if not text.strip():
            yield _Line(number, None)
            continue
        record: dict[str, Any] = {"line": number}
        try:
            record = _parse(text)
            item = _item(record)
            classifier.check(item, truncate, chunks)
        except InputError as e:
            yield _Line(number, record, error=e.said_of(f"line {number}"))
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
    if "messages" in record and "text" not in record:
        return Chat.of(record["messages"], 0)
    text, second = record.get("text"), record.get("text_pair")
    if not isinstance(text, str) or not isinstance(second, str | None):
        raise InputError(
            'a line needs a "text", and may have a "text_pair", both strings; or "messages", which are a conversation'
        )
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
        return sum(1 for _ in file)
