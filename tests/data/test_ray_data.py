"""Groups as the actors of a real Ray Data: a dataset, folders of files, a rank that is killed, a server beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tpray
from tests.commands.test_many_files import damage, write
from tests.served import alive, assert_all_gone, children_of, start
from tpray.commands.classify_file import How
from tpray.commands.classify_files import Totals, classify_files
from tpray.local_ray.local import ensure_ray, stop_ray
from tpray.platforms.topology import Topology

pytestmark = pytest.mark.ray
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("pandas")

TEXTS = 499
"""As many different texts: so many can be asked of one group quickly, to compare."""


@pytest.fixture(scope="module", autouse=True)
def _ray(session_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPRAY_CACHE", str(session_folder / "cache"))  # of the processes that Ray starts
        assert ensure_ray(2)
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        stop_ray()


@pytest.fixture(scope="module")
def labels(_ray: None) -> dict[str, str]:
    """What one group, asked without Ray Data, says of each text."""
    texts = [text_of(number) for number in range(TEXTS)]
    with tpray.load(tp=1, cores=1) as classifier:
        return {text: row[0]["label"] for text, row in zip(texts, classifier.classify(texts), strict=True)}


def text_of(number: int) -> str:
    return f"firm {number % TEXTS} is based in {'Paris' if number % 3 else 'Rome'}"[: 20 + number % 7]


def write_texts(folder: Path, files: int, rows: int) -> None:
    folder.mkdir(parents=True)
    for number in range(files):
        ids = range(number * rows, (number + 1) * rows)
        table = pa.table({"id": list(ids), "text": [text_of(i % TEXTS) for i in ids]})
        pq.write_table(table, folder / f"{number:03d}.parquet")


def room_comes_back() -> bool:
    """Whether all CPUs of the Ray are free soon."""
    import ray

    give_up = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0.0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > give_up:
            return False
        time.sleep(0.2)
    return True


def ranks() -> set[int]:
    """The processes of all ranks of this process's Ray."""
    return processes(b"WorkerHost")


def processes(named: bytes) -> set[int]:
    """Those of this process's Ray whose title has ``named``."""
    found = set()
    for pid in children_of(os.getpid()):
        try:
            if named in Path(f"/proc/{pid}/cmdline").read_bytes() and alive(pid):
                found.add(pid)
        except OSError:  # it has just ended
            continue
    return found


def test_a_dataset_keeps_its_rows_in_order(tmp_path: Path, labels: dict[str, str]) -> None:
    """By two groups; the second time they come up again, in the room that the first ones have left."""
    import ray

    write_texts(tmp_path / "in", 4, 250)
    bad = pa.table({"id": [-1, -2], "text": ["", "x " * 9000]})
    pq.write_table(bad, tmp_path / "in/999.parquet")
    dataset = ray.data.read_parquet(str(tmp_path / "in"))
    dataset.context.execution_options.preserve_order = True
    made = tpray.data.classify(dataset, tp=1, replicas=2, batch_size=100)
    rows = made.take_all()
    assert [row["id"] for row in rows] == [*range(1000), -1, -2]
    assert [row["label"] for row in rows[:-2]] == [labels[row["text"]] for row in rows[:-2]]
    assert [row["label"] for row in rows[-2:]] == [None, None]
    assert rows[-2]["error"] == "the text is empty: send some text"
    assert "shorten it" in rows[-1]["error"]
    with pytest.raises(tpray.errors.ConfigError, match="the dataset has no column 'body', but id, text: name one with"):
        tpray.data.classify(dataset, text_column="body")
    assert made.limit(5).take_all() == rows[:5]
    assert room_comes_back()


def test_a_group_without_room_says_so() -> None:
    import ray

    dataset = ray.data.from_items([{"text": "a"}])
    wanted = tpray.data.classify(dataset, tp=2, cores=32, patience_s=1)
    with pytest.raises(
        ray.exceptions.RayError, match=r"needs 64 CPUs on one node, and no node .* has more than 2 CPUs"
    ):
        wanted.take_all()


def test_the_room_of_an_actor_that_was_killed_comes_back_though_nobody_wants_any() -> None:
    """Ray Data kills actors that are still starting when a dataset has what it wants."""
    import ray
    from ray.util import list_named_actors

    from tpray.data.room import place, sweeper_name

    class Taking:
        def take(self, topology: Topology) -> bool:
            self.placement = place(topology, 10)
            return True

    made: Any = ray.remote(Taking)
    until_no_sweeper()  # of another test: this one has to be there in time
    actor = made.options(num_cpus=0).remote()
    assert ray.get(actor.take.remote(Topology(2)))
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"] - 2
    ray.kill(actor)
    assert room_comes_back()
    assert sweeper_name() in list_named_actors()
    until_no_sweeper()


def until_no_sweeper() -> None:
    """It goes when there is nothing to sweep."""
    from ray.util import list_named_actors

    from tpray.data.room import LINGER_S, sweeper_name

    give_up = time.monotonic() + LINGER_S + 20
    while sweeper_name() in list_named_actors():
        assert time.monotonic() < give_up, "it stays though there is nothing to sweep"
        time.sleep(0.5)


def run(source: Path, out: Path, replicas: int, resume: bool = False) -> tuple[Totals, str]:
    console = Console(file=StringIO(), width=400)
    options: dict[str, Any] = {"dtype": "float32"}
    totals = classify_files(str(source), str(out), How(resume=resume), None, 1, replicas, 1, options, console)
    return totals, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.nightly
def test_a_damaged_file_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        write(source / f"{number}.parquet", 500, start=number * 500)
    whole = (source / "1.parquet").read_bytes()
    damage(source / "1.parquet")
    write(source / "2a.parquet", 10, column="body")
    (source / "deep").mkdir()
    (source / "deep/t.csv").write_text("id,text\n1,a\n2,\n")
    totals, said = run(source, out, 2)
    assert totals == Totals(files=4, failed=2, kept=0, classified=1501, refused=1)
    assert "not done: " in said
    assert f"{source}/1.parquet" in said
    assert "2a.parquet has no column 'text', but id, body: name one with --text-column" in said
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {name for name in made if ".partial" not in name} == {"0.parquet", "2.parquet", "3.parquet", "deep/t.csv"}
    for number in (0, 2, 3):
        table = pq.read_table(out / f"{number}.parquet")
        assert table.select(["id", "text"]).equals(pq.read_table(source / f"{number}.parquet"))
        assert None not in table["label"].to_pylist()
    (source / "1.parquet").write_bytes(whole)
    (source / "2a.parquet").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("[023].parquet")}
    totals, _ = run(source, out, 1, resume=True)
    assert totals == Totals(files=1, failed=0, kept=4, classified=500, refused=0)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert pq.read_table(out / "1.parquet")["id"].to_pylist() == list(range(500, 1000))


BESIDE = """
import sys
import ray
import tpray

url, source, out = sys.argv[1:]

class Ask:
    def __init__(self):
        self.handle = tpray.connect(url=url)

    def __call__(self, batch):
        rows = self.handle.classify.remote(list(batch["text"])).result()
        return batch | {"label": [scores[0]["label"] for scores in rows]}

tpray.connect(url=url)
ray.data.DataContext.get_current().enable_progress_bars = False
pool = ray.data.ActorPoolStrategy(size=2)
ray.data.read_parquet(source).map_batches(Ask, compute=pool, batch_size=32).write_parquet(out)
"""


def test_ray_data_beside_a_server_gets_its_cpus(
    tmp_path: Path, labels: dict[str, str], free_port: Callable[[], int]
) -> None:
    """Its tasks want a CPU each, and the server's ranks have as many as the machine."""
    write_texts(tmp_path / "in", 2, 200)
    server = start(free_port(), tmp_path, "--tp", "1", "--replicas", "1")
    try:
        subprocess.run(
            [sys.executable, "-c", BESIDE, server.url, str(tmp_path / "in"), str(tmp_path / "out")],
            check=True, timeout=240,
        )  # fmt: skip
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert sorted(row["id"] for row in found) == list(range(400))
    assert all(row["label"] == labels[row["text"]] for row in found)


@pytest.mark.slow
def test_of_100000_rows_none_is_lost_or_twice_when_a_rank_and_an_actor_are_killed(
    tmp_path: Path, labels: dict[str, str]
) -> None:
    import ray

    rows = 100_000
    write_texts(tmp_path / "in", 50, rows // 50)
    made = tpray.data.classify(ray.data.read_parquet(str(tmp_path / "in")), tp=1, replicas=2)
    seen, known, started, killed, actor = bytearray(rows), set[int](), 0.0, 0, 0
    batches: Any = made.iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in batches:
        started = started or time.monotonic()
        if not killed and sum(seen) >= rows // 5:  # both groups are up
            known = ranks()
            killed = max(known)
            os.kill(killed, signal.SIGKILL)
        elif killed and not actor:
            known |= ranks()
            if sum(seen) >= rows // 2:
                actor = max(processes(b"MapWorker"))
                os.kill(actor, signal.SIGKILL)
        for row in batch.select(["id", "text", "label", "error"]).to_pylist():
            assert not seen[row["id"]], f"row {row['id']} came twice"
            seen[row["id"]] = 1
            assert (row["label"], row["error"]) == (labels[row["text"]], None)
    print(f"{rows / (time.monotonic() - started):.0f} rows a second after the first")
    assert sum(seen) == rows
    assert not alive(killed)
    assert len(known) == 3, "the group that has lost its rank got another"
    assert room_comes_back()


@pytest.mark.nightly
def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_texts(source, 12, 1500)
    log = tmp_path / "log"
    command = ["classify", "--in", str(source), "--out", str(out), "--tp", "1", "--replicas", "2", "--dtype", "float32"]
    process = subprocess.Popen([sys.executable, "-m", "tpray", *command], stderr=log.open("w"))
    give_up = time.monotonic() + 240
    while not list(out.glob("*.parquet")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.05)
    family = children_of(process.pid)
    process.kill()
    process.wait()
    assert_all_gone(family, 30)  # none of them writes any more
    done = {path.name for path in out.glob("*.parquet")}
    assert 0 < len(done) < 12
    totals, _ = run(source, out, 2, resume=True)
    assert totals.kept + totals.files == 12
    assert totals.kept >= len(done)
    for path in sorted(source.iterdir()):
        table = pq.read_table(out / path.name)
        assert table.select(["id", "text"]).equals(pq.read_table(path))
        assert None not in table["label"].to_pylist()
    assert not list(out.glob(".*"))
