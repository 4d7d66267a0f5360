"""Tables in and out, as CSV and as Parquet, here and at a URL: every row in its place, with all that it had."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console

from tpray.commands import classify_file as module
from tpray.commands.classify_file import Counts, How, Progress, classify_file, read_texts
from tpray.commands.jsonl import JsonlReader
from tpray.commands.records import check_source, check_target, open_reader, open_writer, partial_file
from tpray.data.columns import ADDED, Columns
from tpray.errors import ConfigError, InputError, StoreError
from tpray.serving.local import LocalClassifier

Run = Callable[..., Counts]


@pytest.fixture
def run(classifier: LocalClassifier) -> Run:
    """A function that checks and classifies a file as the command does."""

    def classify(source: Path | str, target: Path | str, **options: Any) -> Counts:
        how = How(**options)
        check_source(str(source), how.columns)
        check_target(str(source), str(target), how.resume)
        return classify_file(classifier, str(source), str(target), Console(stderr=True), how)

    return classify


def rows(path: Path, mark: str = ",") -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file, delimiter=mark))


def parquet() -> tuple[Any, Any]:
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize(("name", "mark"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_a_csv_table_keeps_its_columns_and_rows(name: str, mark: str, run: Run, tmp_path: Path) -> None:
    table = [
        ["id", "body", "label"],
        ["1", f'a "firm"{mark}\nof two lines', "gold"],
        ["2", "", "x"],
        ["3"],
        ["4", "b", "y"],
    ]
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=mark).writerows(table)
    counts = run(tmp_path / name, tmp_path / f"out-{name}", columns=Columns("body"))
    head, *found = rows(tmp_path / f"out-{name}", mark)
    assert head == [*table[0], *(f"tpray_{added}" for added in ADDED)]
    assert [row[:3] for row in found] == [*table[1:3], ["3", "", ""], table[4]]
    assert [bool(row[3]) for row in found] == [True, False, False, True]
    assert 0 < float(found[0][4]) <= 1
    assert [row[-1] for row in found] == [
        "", "row 2 is empty: send some text", "row 3 has 1 cells, and the header 3", "",
    ]  # fmt: skip
    assert str(counts) == "2 classified, 2 refused (rows 2, 3)"


def test_pairs_and_bytes_that_are_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text,other\na,b\nc\xff,d\n")
    counts = run(tmp_path / "t.csv", tmp_path / "out.csv", columns=Columns(pair="other"))
    assert counts.refused == [2]
    assert "row 2" in rows(tmp_path / "out.csv")[2][-1]
    assert b"c\xff,d" in (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (Columns(), "has no column 'text', but id, body: name one with --text-column"),
        (Columns("body", "other"), "has no column 'other', but id, body: name one with --pair-column"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(columns: Columns, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,body\n1,a\n")
    with pytest.raises(ConfigError, match=words):
        check_source(str(tmp_path / "t.csv"), columns)


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--in a.csv is CSV, and --out b.jsonl JSON lines: name files of one kind"):
        check_target("a.csv", "b.jsonl", False)
    with pytest.raises(ConfigError, match="Parquet is not for a terminal: name a file to write with --out"):
        check_target("a.parquet", None, False)


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run be interrupted once."""
    answers, done = module._answers, 0

    def interrupted(*args: Any) -> Iterator[Any]:
        nonlocal done
        for answer in answers(*args):
            if done == count:
                monkeypatch.setattr(module, "_answers", answers)
                raise KeyboardInterrupt
            done += 1
            yield answer

    monkeypatch.setattr(module, "_answers", interrupted)


def test_an_interrupted_csv_goes_on_where_it_was(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a row that was not written whole, wherever it was cut: in a quoted cell, or before the last."""
    source, target = tmp_path / "t.csv", tmp_path / "out.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([str(i), f"text\n{i}, of many"] for i in range(200))])
    for torn in ('120,"text\n12', "120,a,b"):
        interrupt_after(120, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run(source, target)
        with partial_file(str(target)).open("a") as file:
            file.write(torn)
        counts = run(source, target, resume=True)
        assert (counts.kept, counts.classified) == (120, 80)
        assert [row[0] for row in rows(target)[1:]] == [str(i) for i in range(200)]
        assert len({len(row) for row in rows(target)}) == 1
        assert not list(tmp_path.glob(".*"))
    partial_file(str(target)).write_text("id,text,label,score,scores,entities,error\n0,of another,,,,,\n")
    with pytest.raises(ConfigError, match="is not of this input: its row 1 answers another text"):
        run(source, target, resume=True)
    partial_file(str(target)).write_text("")
    assert run(source, target, resume=True).classified == 200
    assert rows(target)[0][:2] == ["id", "text"]


def test_a_parquet_table_keeps_its_types_and_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = parquet()
    count = 2500
    table = pa.table(
        {
            "id": pa.array(range(count), pa.int16()),
            "text": pa.array(["" if i == 7 else None if i == 8 else f"text {i % 5}" for i in range(count)]),
            "at": pa.array([i * 1000 for i in range(count)], pa.timestamp("ms")),
        }
    )
    source, target = tmp_path / "t.parquet", tmp_path / "out.parquet"
    pq.write_table(table, source)
    interrupt_after(1500, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    (partial_file(str(target)) / "part-000001.writing").write_bytes(b"half of one")
    counts = run(source, target, resume=True)
    assert (counts.kept, counts.classified, counts.refused) == (1024, count - 1024, [])
    made = pq.read_table(target)
    assert made.select(table.column_names).equals(table)
    assert made.column_names == [*table.column_names, *ADDED]
    assert [i for i, error in enumerate(made["error"].to_pylist()) if error] == [7, 8]
    assert made["error"][7].as_py() == "row 8 is empty: send some text"
    assert made["scores"][0].as_py()[0]["score"] == made["score"][0].as_py()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "t.parquet"]


def test_numbers_that_are_none_do_not_make_another_table(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN does not equal itself. And a row group may be empty."""
    pa, pq = parquet()
    table = pa.table({"text": ["a"] * 1100, "gold": pa.array([math.nan] * 1100, pa.float32())})
    source, target = tmp_path / "t.parquet", tmp_path / "out.parquet"
    with pq.ParquetWriter(source, table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)
    interrupt_after(1050, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    assert run(source, target, resume=True).kept == 1024
    assert pq.read_table(target)["gold"].to_pylist()[-1] != 0
    assert pq.ParquetFile(target).metadata.num_rows == 1100


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_two_runs_do_not_write_the_same(name: str, tmp_path: Path) -> None:
    """As where one that is started again and again, with ``--resume``, takes longer than the time between."""
    pa, pq = parquet()
    source, target = tmp_path / name, str(tmp_path / f"out-{name}")
    source.write_text("text\na\n")
    if name == "t.parquet":
        pq.write_table(pa.table({"text": ["a"]}), source)
    with ExitStack() as first:
        reader = open_reader(str(source), Columns(), first)
        open_writer(reader, target, first)
        with ExitStack() as second, pytest.raises(ConfigError, match="is being written by another run"):
            open_writer(reader, target, second)
    with ExitStack() as third:
        open_writer(open_reader(str(source), Columns(), third), target, third)


def test_another_parquet_files_parts_are_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = parquet()
    source, target = tmp_path / "t.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1100}), source)
    interrupt_after(1050, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    pq.write_table(pa.table({"text": ["b"] * 1100}), source)
    with pytest.raises(ConfigError, match=r"is not of this input: part-000000\.parquet has other rows; remove it"):
        run(source, target, resume=True)


def test_what_is_no_table_of_texts_is_refused(tmp_path: Path) -> None:
    pa, pq = parquet()
    (tmp_path / "t.parquet").write_text("no table")
    with pytest.raises(ConfigError, match=r"t.parquet is no Parquet file"):
        check_source(str(tmp_path / "t.parquet"), Columns())
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"the column 'text' of .*t.parquet is of int64 and not of strings"):
        check_source(str(tmp_path / "t.parquet"), Columns())


def test_a_missing_pyarrow_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"t.parquet needs pyarrow: .* -m pip install .*\[tables\]"):
        check_source(str(tmp_path / "t.parquet"), Columns())


def test_tables_at_urls(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own file system in memory; what is unfinished lies in the cache."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/tables/t.csv", b"text\na\nb\n")
    assert run("memory://tables/t.csv", "memory://tables/out.csv").classified == 2
    found = list(csv.reader(io.StringIO(files.cat_file("/tables/out.csv").decode())))
    assert [row[0] for row in found] == ["text", "a", "b"]
    assert not partial_file("memory://tables/out.csv").exists()
    with pytest.raises(ConfigError, match=r"there is no file memory://tables/absent\.csv"):
        check_source("memory://tables/absent.csv", Columns())

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", refuse)
        with pytest.raises(StoreError, match=r"cannot be written .*not yours.* try again with --resume"):
            run("memory://tables/t.csv", "memory://tables/out2.csv")
    counts = run("memory://tables/t.csv", "memory://tables/out2.csv", resume=True)
    assert (counts.kept, counts.classified) == (2, 0)
    assert files.cat_file("/tables/out2.csv") == files.cat_file("/tables/out.csv")


def test_documents_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("body\na\n\nb\n")
    assert read_texts(str(tmp_path / "t.csv"), Columns("body")) == ("row", [(1, "a"), (3, "b")])
    (tmp_path / "t.csv").write_text("text,text_pair\na,b\n")
    with pytest.raises(InputError, match="row 1 is a pair or a conversation"):
        read_texts(str(tmp_path / "t.csv"), Columns())


def test_progress_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"text": "a"}\n' * 40000
    reader = JsonlReader(io.BytesIO(lines), "a.jsonl")
    shown = io.StringIO()
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.0)
    with Progress(Console(file=shown), reader) as progress:
        records = iter(reader)
        for _ in range(20000):
            next(records)
            progress.advance()
        said = progress.said(100.0)
    assert re.fullmatch(r"20000 lines, 200 a second, 5\d%, 1 min 3\d s left", said)
    assert "lines, " in shown.getvalue()
