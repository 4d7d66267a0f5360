"""Files of records to classify: JSON lines, tables as CSV and as Parquet; on this machine or at a URL.

A kind of file is a `Reader` and a `Writer`. What is written goes to a partial file first, which takes the target's
name, or is copied to its URL, when it is complete. A run that was interrupted goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from tpray.artifacts.store import EXTRAS, file_system, is_url
from tpray.config import cache_dir
from tpray.data.columns import Columns
from tpray.errors import ConfigError, InputError, StoreError, TprayError

STANDARD_INPUT = "-"
KINDS = {
    ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON lines",
    ".csv": "CSV", ".tsv": "CSV",
    ".parquet": "Parquet", ".pq": "Parquet",
}  # fmt: skip
"""By the end of a file's name; another name is that of JSON lines."""

Record = dict[str, Any] | InputError | None
"""One record; or why it cannot be read; or None, a blank line."""


class RowError(InputError):
    """A row that is not as its table's header says. cells: what it has."""

    def __init__(self, message: str, cells: list[str]) -> None:
        super().__init__(message, 0)
        self.cells = cells


class Reader(Protocol):
    """The records of a file, in order. unit: what one is called, line or row."""

    unit: str

    def __iter__(self) -> Iterator[Record]: ...

    def share(self) -> float | None:
        """How much of the file was read, from 0 to 1; None: that is not known."""


class Writer(Protocol):
    """Writes the same kind, to the partial file or to standard output."""

    def resume(self, records: Iterator[Record]) -> int:
        """How many records an earlier run has written; so many are taken from ``records``.

        Raises:
            ConfigError: it was another input's.
        """

    def write(self, record: Record, added: dict[str, Any], number: int) -> None:
        """A record with what it is given, see `columns.ADDED`; ``number`` is its own, from 1."""

    def finish(self) -> Path | None:
        """What was written is complete; the file that has it, if it is one."""


def kind_of(name: str) -> str:
    """The kind of a file, by its name."""
    return KINDS.get(PurePosixPath(name).suffix.lower(), "JSON lines")


def partial_file(target: str) -> Path:
    """Where the records for ``target`` are until it is complete: beside it; in the cache, if it is at a URL."""
    if is_url(target):
        digest = hashlib.sha256(target.encode()).hexdigest()[:16]
        return cache_dir() / "unfinished" / f"{digest}-{PurePosixPath(target).name}"
    return Path(target).with_name(f".{Path(target).name}.partial")


def check_source(source: str, columns: Columns) -> None:
    """Refuse, before anything is started, what cannot be read.

    Raises:
        ConfigError: there is no such file or column. StoreError: a URL cannot be reached.
    """
    if source == STANDARD_INPUT:
        return
    if not exists(source):
        raise ConfigError(f"there is no file {source}")
    with ExitStack() as stack:
        next(iter(open_reader(source, columns, stack)), None)


def check_target(source: str, target: str | None, resume: bool) -> None:
    """Refuse, before anything is started, what cannot be written.

    Raises:
        ConfigError: there is no such folder, the kinds differ, or an earlier run was interrupted.
    """
    kind = kind_of(source)
    if target is None:
        if resume:
            raise ConfigError("--resume goes on with the file that --out names: name it")
        if kind == "Parquet":
            raise ConfigError("Parquet is not for a terminal: name a file to write with --out")
        return
    if kind_of(target) != kind:
        raise ConfigError(f"--in {source} is {kind}, and --out {target} {kind_of(target)}: name files of one kind")
    if is_url(target):
        file_system(target)
    elif not Path(target).absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {Path(target).absolute().parent} to write {Path(target).name} in")
    check_partial(target, resume)
    if resume and source == STANDARD_INPUT:
        raise ConfigError("--resume reads its input again from the start: name a file with --in")


def check_partial(target: str, resume: bool) -> None:
    """Refuse a target that an interrupted run has begun, unless that is to be gone on with.

    Raises:
        ConfigError: there is such a one.
    """
    partial = partial_file(target)
    if partial.exists() and not resume:
        raise ConfigError(
            f"{partial} is left from a run that was interrupted: go on with it with --resume, or remove it"
        )


def exists(source: str) -> bool:
    """Whether there is such a file; `StoreError`: its store does not say."""
    if not is_url(source):
        return Path(source).is_file()
    files, path = file_system(source)
    try:
        return bool(files.isfile(path))
    except TprayError:
        raise
    except Exception as e:
        raise StoreError(f"{source} cannot be read: {type(e).__name__}: {e}") from e


def open_bytes(source: str, stack: ExitStack) -> IO[bytes]:
    """The bytes of a file, of one at a URL or of standard input; open as long as ``stack`` is."""
    if source == STANDARD_INPUT:
        return sys.stdin.buffer
    if not is_url(source):
        return stack.enter_context(Path(source).open("rb"))
    files, path = file_system(source)
    try:
        opened: IO[bytes] = stack.enter_context(files.open(path, "rb"))
    except Exception as e:
        raise StoreError(f"{source} cannot be read: {type(e).__name__}: {e}") from e
    return opened


def share_of(file: IO[bytes], size: int | None) -> float | None:
    """How much of a file of ``size`` bytes was read."""
    return None if not size else min(1.0, file.tell() / size)


def size_of(file: IO[bytes]) -> int | None:
    """Bytes of an open file; None: nobody knows, as of standard input."""
    if not file.seekable():
        return None
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def open_reader(source: str, columns: Columns, stack: ExitStack) -> Reader:
    """The reader of a file, by its kind.

    Raises:
        ConfigError: it cannot be read as that kind, or lacks a column.
    """
    kind = kind_of(source)
    if kind == "CSV":
        from tpray.commands.csv_files import CsvReader

        return CsvReader(open_bytes(source, stack), source, columns)
    if kind == "Parquet":
        from tpray.commands.parquet_files import ParquetReader

        return ParquetReader(open_bytes(source, stack), source, columns)
    from tpray.commands.jsonl import JsonlReader

    return JsonlReader(open_bytes(source, stack), source)


def open_writer(reader: Reader, target: str | None, stack: ExitStack) -> Writer:
    """The writer of the kind that ``reader`` reads.

    Raises:
        ConfigError: another run is writing the same.
    """
    from tpray.commands.csv_files import CsvReader, CsvWriter
    from tpray.commands.jsonl import JsonlWriter
    from tpray.commands.parquet_files import ParquetReader, ParquetWriter

    partial = None if target is None else partial_file(target)
    if partial is not None:
        partial.parent.mkdir(mode=0o700, exist_ok=True)
        if isinstance(reader, ParquetReader):
            partial.mkdir(exist_ok=True)
        else:
            partial.touch()
        _hold(partial, stack)
    if isinstance(reader, CsvReader):
        return CsvWriter(reader, partial, stack)
    if isinstance(reader, ParquetReader):
        assert partial is not None, "checked before"
        return ParquetWriter(reader, partial)
    return JsonlWriter(partial, stack)


def _hold(partial: Path, stack: ExitStack) -> None:
    """Keep others from writing to ``partial`` as long as ``stack`` is open, and this process runs."""
    fd = os.open(partial, os.O_RDONLY)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ConfigError(f"{partial} is being written by another run: wait for its end, or end it") from e
    except OSError:  # a file system without locks
        return


def deliver(complete: Path, target: str) -> None:
    """Give the complete file its name, or copy it to its URL, where it is never half there; nothing else stays.

    Raises:
        StoreError: it cannot be written there.
    """
    partial = partial_file(target)
    if is_url(target):
        files, path = file_system(target)
        try:
            if target.partition(":")[0] in EXTRAS:  # an object there is written whole
                files.put_file(str(complete), path)
            else:
                files.put_file(str(complete), f"{path}.partial")
                files.mv(f"{path}.partial", path)
        except Exception as e:
            raise StoreError(
                f"{target} cannot be written ({type(e).__name__}: {e}): all answers are in {partial}; try again with "
                "--resume"
            ) from e
    else:
        os.replace(complete, target)
    discard(partial)


def discard(partial: Path) -> None:
    """Remove a partial file, or folder of parts, if there is one."""
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
