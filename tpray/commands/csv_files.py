"""Tables as CSV: a header, and a row for each record. What is added to a row that is no single value is JSON."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TextIO

from tpray.commands.records import Record, RowError, share_of, size_of
from tpray.data.columns import ADDED, Columns, prefix_of
from tpray.errors import ConfigError, InputError

LONGEST_CELL = 2**31 - 1
"""Characters; Python's own limit is 131072."""


class CsvReader:
    """A `Reader` of a table with a header.

    Raises:
        ConfigError: there is no header, or a column is missing.
    """

    unit = "row"

    def __init__(self, file: IO[bytes], source: str, columns: Columns) -> None:
        csv.field_size_limit(LONGEST_CELL)
        self._file, self._size = file, size_of(file)
        # What is not UTF-8 becomes half a surrogate pair, and its row is refused; a byte order mark is not text.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first = text.readline()
        self.mark = max(",;\t", key=first.count) if first.strip() else ","
        self.columns = next(csv.reader([first], delimiter=self.mark), [])
        columns.check(self.columns, source)
        self._rows = csv.reader(text, delimiter=self.mark)

    def __iter__(self) -> Iterator[Record]:
        while True:
            try:
                cells = next(self._rows)
            except StopIteration:
                return
            except csv.Error as e:
                yield InputError(f"is no CSV: {e}", 0)
                continue
            if not cells:
                yield None
            elif len(cells) != len(self.columns):
                yield RowError(f"has {len(cells)} cells, and the header {len(self.columns)}", cells)
            else:
                yield dict(zip(self.columns, cells, strict=True))

    def share(self) -> float | None:
        """See `Reader`."""
        return share_of(self._file, self._size)


class CsvWriter:
    """A `Writer` of the columns that were read and of what is added."""

    def __init__(self, reader: CsvReader, partial: Path | None, stack: ExitStack) -> None:
        self._columns, self._mark, self._partial = reader.columns, reader.mark, partial
        self._prefix = prefix_of(reader.columns)
        self._file: TextIO = sys.stdout
        if partial is not None:
            # errors: bytes that were not UTF-8 come back as they were
            self._file = stack.enter_context(partial.open("a", encoding="utf-8", errors="surrogateescape", newline=""))
        self._writer = csv.writer(self._file, delimiter=self._mark, lineterminator="\n")
        if partial is None or partial.stat().st_size == 0:
            self._write_header()

    def _write_header(self) -> None:
        self._writer.writerow([*self._columns, *(self._prefix + name for name in ADDED)])

    def resume(self, records: Iterator[Record]) -> int:
        """See `Writer`; a row that was not written whole is lost."""
        assert self._partial is not None, "standard output is not resumed"
        whole = self._partial.with_name(f"{self._partial.name}.whole")
        kept, last, record = -1, list[str](), None
        with (
            self._partial.open(encoding="utf-8", errors="surrogateescape", newline="") as written,
            whole.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, delimiter=self._mark, lineterminator="\n")
            for row in _whole_rows(written, self._mark, len(self._columns) + len(ADDED)):
                writer.writerow(row)
                if kept >= 0:
                    record = next(records, None)
                kept, last = kept + 1, row
        if kept > 0 and isinstance(record, dict) and last[: len(self._columns)] != list(record.values()):
            whole.unlink()
            raise ConfigError(f"{self._partial} is not of this input: its row {kept} answers another text; remove it")
        self._file.seek(0)
        self._file.truncate()  # the same file stays open, and gets what is whole
        if kept < 0:
            self._write_header()
        with whole.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            shutil.copyfileobj(file, self._file)
        whole.unlink()
        return max(0, kept)

    def write(self, record: Record, added: dict[str, Any], number: int) -> None:
        """See `Writer`."""
        if record is None:
            self._file.write("\n")
            return
        wanted = len(self._columns)
        cells = list(record.values()) if isinstance(record, dict) else getattr(record, "cells", [])
        cells = cells[:wanted] + [""] * (wanted - len(cells))
        self._writer.writerow([*cells, *(_cell(added.get(name)) for name in ADDED)])

    def finish(self) -> Path | None:
        """See `Writer`."""
        self._file.flush()
        return self._partial


def _whole_rows(file: TextIO, mark: str, cells: int) -> Iterator[list[str]]:
    """The rows of a partial file up to one that was not written whole."""
    ended = True

    def lines() -> Iterator[str]:
        nonlocal ended
        for line in file:
            ended = line.endswith("\n")
            yield line

    reader = csv.reader(lines(), delimiter=mark, strict=True)
    while True:
        try:
            row = next(reader)
        except (StopIteration, csv.Error):
            return
        if not ended or (row and len(row) != cells):
            return
        yield row


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return value if isinstance(value, str | float) else json.dumps(value, ensure_ascii=False)
