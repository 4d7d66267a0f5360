"""JSON lines: an object a line, and blank lines stay where they are."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TextIO

from tpray.commands.records import Record, share_of, size_of
from tpray.data.columns import prefix_of
from tpray.errors import ConfigError, InputError


class JsonlReader:
    """A `Reader` of JSON lines.

    Raises:
        ConfigError: it looks like a table.
    """

    unit = "line"

    def __init__(self, file: IO[bytes], source: str) -> None:
        self._file, self._size, self._source = file, size_of(file), source
        # What is not UTF-8 becomes half a surrogate pair, and its line is refused; a byte order mark is not text.
        self._lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")

    def __iter__(self) -> Iterator[Record]:
        first = True
        for line in self._lines:
            if not line.strip():
                yield None
                continue
            if first and not line.lstrip().startswith("{") and _is_table(line):
                raise ConfigError(f"{self._source} looks like a table: give a CSV file a name that ends in .csv")
            first = False
            yield _parse(line)

    def share(self) -> float | None:
        """See `Reader`."""
        return share_of(self._file, self._size)


class JsonlWriter:
    """A `Writer` of JSON lines."""

    def __init__(self, partial: Path | None, stack: ExitStack) -> None:
        self._partial = partial
        self._file: TextIO = sys.stdout
        if partial is not None:
            self._file = stack.enter_context(partial.open("a", encoding="utf-8"))

    def resume(self, records: Iterator[Record]) -> int:
        """See `Writer`; a line that was not written whole is lost."""
        assert self._partial is not None, "standard output is not resumed"
        whole, kept, last, record = 0, 0, b"", None
        with self._partial.open("rb") as written:
            for line in written:
                if not line.endswith(b"\n"):
                    break
                whole, kept, last = whole + len(line), kept + 1, line
                record = next(records, None)
        found = json.loads(last) if last.strip() else {}
        if isinstance(record, dict) and not record.items() <= found.items():
            raise ConfigError(f"{self._partial} is not of this input: its line {kept} answers another text; remove it")
        self._file.truncate(whole)
        return kept

    def write(self, record: Record, added: dict[str, Any], number: int) -> None:
        """See `Writer`; a line that cannot be read becomes its number and its error."""
        if record is None:
            self._file.write("\n")
            return
        known = record if isinstance(record, dict) else {"line": number}
        prefix = prefix_of(known)
        self._file.write(_dump(known | {prefix + name: value for name, value in added.items()}) + "\n")

    def finish(self) -> Path | None:
        """See `Writer`."""
        self._file.flush()
        return self._partial


def _is_table(line: str) -> bool:
    """Whether a line that is not an object looks like the header of a table."""
    return any(len(line.split(mark)) > 1 and "text" in line.lower() for mark in (",", "\t", ";"))


def _parse(text: str) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        return InputError(f"is not valid JSON: {e}", 0)
    return record if isinstance(record, dict) else InputError("is no JSON object with a text", 0)


def _dump(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a refused line with half a surrogate pair or broken UTF-8: kept, escaped
        return json.dumps(record)
    return text
