"""A folder or a pattern of files: which are read, where answers go, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import fsspec
import pytest

from tpray.commands.classify import classify
from tpray.commands.classify_file import How
from tpray.commands.classify_files import Job, Totals, _check, _classify, find, is_many
from tpray.commands.records import partial_file
from tpray.data.columns import Columns
from tpray.errors import ConfigError, GroupError
from tpray.serving.local import LocalClassifier

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("pandas")


class Told:
    """What the work on a file tells, with nobody who listens."""

    def __init__(self, begun: bool = False) -> None:
        self.begun = begun
        self.said: list[tuple[int, float]] = []

    def begin(self) -> bool:
        return self.begun

    def say(self, count: int, share: float) -> None:
        self.said.append((count, share))


def write(path: Path, rows: int = 3, column: str = "text", start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(start, start + rows)
    pq.write_table(pa.table({"id": list(numbers), column: [f"text {i}" for i in numbers]}), path, row_group_size=100)
    return path


def damage(path: Path) -> None:
    """Have the index be whole, and a row group not."""
    found = bytearray(path.read_bytes())
    quarter = len(found) // 4
    found[quarter : 2 * quarter] = bytes(quarter)
    path.write_bytes(found)


def test_a_folder_has_the_tables_beneath_it(tmp_path: Path) -> None:
    for name in ("a.parquet", "b/c.csv", "b/.d.csv", "_temporary/e.csv", "notes.txt", "f.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    found = find(str(tmp_path / "in"))
    job = Job(found.base, str(tmp_path / "out"), How())
    assert [job.target(name) for name in found.sizes] == [
        f"{tmp_path}/out/{name}" for name in ("a.parquet", "b/c.csv", "f.jsonl")
    ]
    assert set(found.sizes.values()) == {1}


def test_a_pattern_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/1.csv", "y/1.csv", "y/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    monkeypatch.chdir(tmp_path)
    assert list(find("*/1.csv").sizes) == ["x/1.csv", "y/1.csv"]
    assert list(find("./y/?.txt").sizes) == ["./y/2.txt"]
    assert Job(find("./y/*").base, "out", How()).target("./y/2.txt") == "out/2.txt"
    with pytest.raises(ConfigError, match=r"no file is called y/\*\.pq"):
        find("y/*.pq")


def test_a_folder_is_no_pattern_whatever_its_name(tmp_path: Path) -> None:
    for folder in ("a[1]", "a1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.csv").write_text("text\n")
    found = find(f"{tmp_path}/a[1]")
    assert (found.base, list(found.sizes)) == (f"{tmp_path}/a[1]", [f"{tmp_path}/a[1]/b.csv"])


def test_no_two_files_have_one_output(tmp_path: Path) -> None:
    for name in ("a/1.csv", "b/1.csv", "b/1.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    found = find(str(tmp_path))
    job = Job(found.base, "out", How())
    assert len({partial_file(job.target(name)) for name in found.sizes}) == 3
    with pytest.raises(ConfigError, match="goes up again after a pattern"):
        find(f"{tmp_path}/*/../b/*.csv")  # b/1.csv, below a and below b


def test_local_names_are_those_of_the_commands_folder() -> None:
    job = Job("in", "out", How(), "/home")
    assert [job.at(name) for name in ("in/a.csv", "/x/a.csv", "s3://b/a.csv")] == [
        "/home/in/a.csv", "/x/a.csv", "s3://b/a.csv",
    ]  # fmt: skip


def test_files_at_urls() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/many/1/a.csv", b"text\na\n")
    files.pipe_file("/many/2/b.csv", b"text\nb\n")
    for source in ("memory://many/", "memory://many/*/*.csv"):
        found = find(source)
        job = Job(found.base, "memory://labels", How())
        assert [job.target(name) for name in found.sizes] == ["memory://labels/1/a.csv", "memory://labels/2/b.csv"]
        assert _check(found, job) == (list(found.sizes), {})


def test_one_file_is_not_many(tmp_path: Path) -> None:
    (tmp_path / "a[1].csv").write_text("text\n")
    assert not is_many(str(tmp_path / "a[1].csv"))
    assert is_many(str(tmp_path))
    assert is_many(f"{tmp_path}/*.csv")
    assert [is_many(url) for url in ("s3://b/a.csv", "s3://b/a/", "s3://b/*.csv")] == [False, True, True]
    assert not is_many("https://host/a.jsonl?signature=x"), "a signed URL"
    with pytest.raises(ConfigError, match="--replicas is for a folder or a pattern of files"):
        classify(input_file=str(tmp_path / "a[1].csv"), replicas=2)
    with pytest.raises(ConfigError, match="names many files: name a folder to write with --out"):
        classify(input_file=str(tmp_path))


def test_files_without_the_column_are_named_before_anything_starts(tmp_path: Path) -> None:
    write(tmp_path / "in/1.parquet")
    write(tmp_path / "in/2.parquet", column="body")
    (tmp_path / "in/3.parquet").write_text("no table")
    found = find(str(tmp_path / "in"))
    left, failed = _check(found, Job(found.base, str(tmp_path / "out"), How()))
    assert left == [f"{tmp_path}/in/1.parquet"]
    assert "2.parquet has no column 'text', but id, body: name one with" in failed[f"{tmp_path}/in/2.parquet"]
    assert "3.parquet is no Parquet file" in failed[f"{tmp_path}/in/3.parquet"]
    with pytest.raises(ConfigError, match="has no column 'absent', but id, text: name one with --text-column"):
        _check(found, Job(found.base, str(tmp_path / "out"), How(columns=Columns("absent"))))


def test_outputs_are_not_among_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/out/1.parquet")
    found = find(str(tmp_path / "in"))
    for out in (f"{tmp_path}/in", f"{tmp_path}/in/out"):
        with pytest.raises(ConfigError, match="is where --in reads: name another folder"):
            _check(found, Job(found.base, out, How()))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in (f"{tmp_path}/in/new", f"{tmp_path}/link", f"file://{tmp_path}/in/out"):
        with pytest.raises(ConfigError, match="is where --in reads"):
            _check(found, Job(found.base, out, How()))
    assert _check(found, Job(found.base, f"{tmp_path}/in/_labels", How()))[0], "what --in does not read"
    assert _check(find(f"{tmp_path}/in/*/*.parquet"), Job(f"{tmp_path}/in", f"{tmp_path}/in/new", How()))[0]
    monkeypatch.chdir(tmp_path / "in/out")
    with pytest.raises(ConfigError, match="is where --in reads"):
        _check(find("*.parquet"), Job("", ".", How()))
    with pytest.raises(ConfigError, match=r"there is no folder .*absent to make out in"):
        _check(found, Job(found.base, f"{tmp_path}/absent/out", How()))


def test_what_is_done_is_not_done_again_and_what_was_begun_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"in/{number}.parquet")
    found = find(str(tmp_path / "in"))
    job, again = (Job(found.base, str(tmp_path / "out"), How(resume=resume)) for resume in (False, True))
    write(tmp_path / "out/1.parquet")
    assert len(_check(found, job)[0]) == 2
    assert _check(found, again)[0] == [f"{tmp_path}/in/2.parquet"]
    partial_file(job.target(f"{tmp_path}/in/2.parquet")).mkdir()
    with pytest.raises(ConfigError, match=r"2\.parquet\.partial is left from a run that was interrupted"):
        _check(found, job)
    assert len(_check(found, again)[0]) == 1


def test_a_file_that_is_damaged_within_says_so_and_is_gone_on_with(classifier: LocalClassifier, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in/1.parquet", 3000), tmp_path / "out/sub/1.parquet"
    whole = source.read_bytes()
    damage(source)
    job = Job(str(tmp_path / "in"), str(tmp_path / "out/sub"), How())
    assert set(_classify(job, classifier, str(source), Told())) == {"error"}  # type: ignore[arg-type]
    assert not target.exists()
    source.write_bytes(whole)
    assert _classify(job, classifier, str(source), Told(begun=True)) == {  # type: ignore[arg-type]
        "classified": 3000, "refused": 0,
    }  # fmt: skip
    assert pq.read_table(target)["id"].to_pylist() == list(range(3000))
    assert not partial_file(str(target)).exists()


def test_whatever_a_reader_raises_is_its_files_and_a_groups_error_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, classifier = Job(str(tmp_path / "in"), str(tmp_path / "out"), How()), cast(LocalClassifier, None)

    def fail_with(error: Exception) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise error

        return fail

    for error in (pa.ArrowNotImplementedError("no such codec"), RuntimeError("no such codec")):
        monkeypatch.setattr("tpray.commands.classify_files.classify_file", fail_with(error))
        found = _classify(job, classifier, f"{tmp_path}/in/1.parquet", Told())  # type: ignore[arg-type]
        assert found == {"error": "no such codec"}
    monkeypatch.setattr("tpray.commands.classify_files.classify_file", fail_with(GroupError("lost")))
    with pytest.raises(GroupError):
        _classify(job, classifier, f"{tmp_path}/in/1.parquet", Told())  # type: ignore[arg-type]


def test_what_another_run_has_left_is_not_taken_for_this_ones(classifier: LocalClassifier, tmp_path: Path) -> None:
    """In the cache of a node that nobody has looked into, when the answers go to a URL."""
    source = write(tmp_path / "in/1.parquet")
    job = Job(str(tmp_path / "in"), str(tmp_path / "out"), How())
    left = partial_file(job.target(str(source)))
    left.mkdir(parents=True)
    write(left / "part-000000.parquet", column="of another")
    assert _classify(job, classifier, str(source), Told())["classified"] == 3  # type: ignore[arg-type]


def test_what_became_of_the_files_is_said() -> None:
    assert (
        str(Totals(3, 1, 2, 30, 4))
        == "3 files done, 30 texts classified, 4 refused; 1 file not done; 2 files were done before"
    )
    assert str(Totals(1)) == "1 file done, 0 texts classified, 0 refused"
