"""Tables as Parquet, by pyarrow. Columns keep their types.

A Parquet file has its index at its end, so that half of one cannot be read. The partial file is a folder of whole ones,
the parts; they become one when the last is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tpray.commands.records import Record
from tpray.data.columns import Columns, arrow_types, prefix_of
from tpray.errors import ConfigError
from tpray.installation import install_command

ROWS = 1024
"""Of a part."""


class ParquetReader:
    """A `Reader` of a Parquet file.

    Raises:
        ConfigError: pyarrow is missing, it is no Parquet file, or a column is missing or has no texts.
    """

    unit = "row"

    def __init__(self, file: IO[bytes], source: str, columns: Columns) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as e:
            raise ConfigError(f"{source} needs pyarrow: {install_command('tables')}") from e
        try:
            self._file = parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as e:
            raise ConfigError(f"{source} is no Parquet file: {str(e).splitlines()[0]}") from e
        self.schema = self._file.schema_arrow
        columns.check(self.schema.names, source)
        self._read = columns.read_of(self.schema.names)
        for name in self._read:
            if name == "messages" != columns.text:
                continue  # a conversation is no string
            kind = self.schema.field(name).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ConfigError(f"the column {name!r} of {source} is of {kind} and not of strings")
        self.batches: list[Any] = []
        """Tables that were read and not written yet."""
        self._done = 0

    def __iter__(self) -> Iterator[Record]:
        import pyarrow

        for batch in self._file.iter_batches(batch_size=ROWS):
            if not batch.num_rows:
                continue
            table = pyarrow.Table.from_batches([batch])
            self.batches.append(table)
            for record in table.select(self._read).to_pylist():
                self._done += 1
                yield record

    def share(self) -> float | None:
        """See `Reader`."""
        return self._done / max(1, int(self._file.metadata.num_rows))


class ParquetWriter:
    """A `Writer` of the columns that were read and of what is added."""

    def __init__(self, reader: ParquetReader, partial: Path) -> None:
        self._reader, self._partial = reader, partial
        self._prefix = prefix_of(reader.schema.names)
        self._added: list[dict[str, Any]] = []
        self._parts = sorted(partial.glob("part-*.parquet"))

    def resume(self, records: Iterator[Record]) -> int:
        """See `Writer`; a part that was not written whole is lost."""
        from pyarrow import parquet

        kept, alike = 0, _comparable(self._reader.schema)
        for part in self._parts:
            found = parquet.read_table(part)
            for _ in range(found.num_rows):
                next(records, None)
            own = self._reader.batches.pop(0) if self._reader.batches else None
            if own is None or not found.select(alike).equals(own.select(alike)):
                raise ConfigError(f"{self._partial} is not of this input: {part.name} has other rows; remove it")
            kept += found.num_rows
        return kept

    def write(self, record: Record, added: dict[str, Any], number: int) -> None:
        """See `Writer`."""
        self._added.append(added)
        if len(self._added) == self._reader.batches[0].num_rows:
            self._write_part()

    def _write_part(self) -> None:
        import pyarrow
        from pyarrow import parquet

        table = self._reader.batches.pop(0)
        for name, kind in arrow_types().items():
            values = [added.get(name) for added in self._added]
            table = table.append_column(self._prefix + name, pyarrow.array(values, kind))
        self._added = []
        part = self._partial / f"part-{len(self._parts):06d}.parquet"
        writing = part.with_suffix(".writing")
        parquet.write_table(table, writing)
        writing.rename(part)
        self._parts.append(part)

    def finish(self) -> Path | None:
        """See `Writer`: the parts become one file."""
        import pyarrow
        from pyarrow import parquet

        whole = self._partial / "whole.parquet"
        schema = self._reader.schema
        for name, kind in arrow_types().items():
            schema = schema.append(pyarrow.field(self._prefix + name, kind))
        with parquet.ParquetWriter(whole, schema) as writer:
            for part in self._parts:
                writer.write_table(parquet.read_table(part).cast(schema))
        return whole


def _comparable(schema: Any) -> list[int]:
    """The columns of which equal rows compare equal: NaN does not equal itself."""
    return [i for i, field in enumerate(schema) if not any(kind in str(field.type) for kind in ("float", "double"))]
