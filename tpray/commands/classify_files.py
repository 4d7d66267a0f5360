"""Many files in, as many out: a folder or a pattern, each file classified by one of several groups."""

from __future__ import annotations

import glob
import itertools
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from tpray.artifacts.resolve import recall_or_find
from tpray.artifacts.settle import settle
from tpray.artifacts.store import file_system, is_url
from tpray.commands.classify_file import LOG_EVERY_S, How, Shown, classify_file, said_of
from tpray.commands.records import KINDS, Reader, check_partial, discard, exists, open_reader, partial_file
from tpray.config import AUTO, ModelConfig, ParallelConfig, ServeConfig, variable_set
from tpray.data.columns import Columns, check_ray_data
from tpray.errors import ConfigError, StoreError, TprayError
from tpray.platforms.cores import core_count

if TYPE_CHECKING:
    from tpray.data.work import Telling
    from tpray.serving.local import LocalClassifier

CHECKS = 16
"""How many files are looked at side by side, before anything is started."""
SAY_EVERY_S = 1.0
"""How often a group says how far its file is."""


@dataclass(frozen=True)
class Sources:
    """Files to read.

    base: the folder that their names in the output begin at. sizes: by name, bytes. deep: whether those in any folder
    beneath it are read.
    """

    base: str
    sizes: dict[str, int]
    deep: bool = False


@dataclass(frozen=True)
class Job:
    """What is done with each file.

    base, out: folders, of what is read and of what is written. folder: that of the command, which those of Ray's
    processes need not be.
    """

    base: str
    out: str
    how: How
    folder: str = ""

    def target(self, source: str) -> str:
        """Where the answers for ``source`` go."""
        return f"{self.out}/{source.removeprefix(self.base).lstrip('/')}"

    def at(self, name: str) -> str:
        """A file's name, whatever folder a process is in."""
        return name if is_url(name) else os.path.join(self.folder, name)


@dataclass
class Totals:
    """What became of the files. failed: those that could not be done. kept: what earlier runs had done."""

    files: int = 0
    failed: int = 0
    kept: int = 0
    classified: int = 0
    refused: int = 0

    def __str__(self) -> str:
        said = f"{_files(self.files)} done, {self.classified} texts classified, {self.refused} refused"
        said += f"; {_files(self.failed)} not done" if self.failed else ""
        return said + (f"; {_files(self.kept)} were done before" if self.kept else "")


def is_many(source: str) -> bool:
    """Whether it names a folder or a pattern, and not one file."""
    if is_url(source):
        # A signed URL has its signature after a question mark.
        path = source.partition("?")[0] if source.startswith(("http://", "https://")) else source
        return path.endswith("/") or _is_pattern(path)
    return Path(source).is_dir() or (_is_pattern(source) and not Path(source).is_file())


def find(source: str) -> Sources:
    """The files that a folder, or a pattern, has; of a folder, those beneath it whose names say that they are tables.

    Hidden ones, and those whose names begin with ``_``, are not among them.

    Raises:
        ConfigError: there is none, or their names in the output could be the same. StoreError: a URL cannot be read.
    """
    parts = source.rstrip("/").split("/")
    every = _is_pattern(source) and (is_url(source) or not Path(source).is_dir())
    fixed = list(itertools.takewhile(lambda part: not _is_pattern(part), parts)) if every else parts
    if ".." in parts[len(fixed) :]:
        raise ConfigError(f"{source} goes up again after a pattern: name the folder that is meant before it")
    base = "/".join(fixed)
    pattern = source if every else f"{base if is_url(source) else glob.escape(base)}/**"
    if is_url(source):
        files, path = file_system(pattern)
        try:
            found = files.glob(path, detail=True)
        except Exception as e:
            raise StoreError(f"{source} cannot be read: {type(e).__name__}: {e}") from e
        rooted = {files.unstrip_protocol(name): info for name, info in found.items() if info["type"] == "file"}
        root = files.unstrip_protocol(file_system(base)[1])
        sizes = {base + name.removeprefix(root): int(info.get("size") or 0) for name, info in rooted.items()}
    else:
        names = [name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        sizes = {name: Path(name).stat().st_size for name in names}
    sizes = {name: sizes[name] for name in sorted(sizes) if _is_visible(name, base) and (every or _is_table(name))}
    if not sizes:
        raise ConfigError(f"there is no file to read in {source}" if not every else f"no file is called {source}")
    return Sources(base, sizes, not every or "**" in source)


def classify_files(
    source: str,
    out: str,
    how: How,
    model: str | None,
    tp: int | Literal["auto"],
    replicas: int | Literal["auto"],
    cores: int | None,
    options: Mapping[str, Any],
    console: Console,
) -> Totals:
    """Classify the files of a folder or a pattern, each by one of several groups, and say what becomes of them.

    Args:
        source: see `find`. out: a folder, for a file of each one's name.
        model, tp, cores, options: of `tpray.load`. replicas: how many groups. What is open is settled for throughput.

    Raises:
        ConfigError: nothing of it can be read, or it cannot be written; nothing was started.
        TprayError: a group cannot start, or be brought back; what is done stays, and ``--resume`` goes on.
    """
    sources = find(source)
    job = Job(sources.base, out.rstrip("/"), how, os.getcwd())
    left, failed = _check(sources, job)
    totals = Totals(failed=len(failed), kept=len(sources.sizes) - len(left) - len(failed))
    for name, problem in failed.items():
        _say_failed(console, name, problem)
    if not left:
        return totals
    replicas = replicas if replicas == AUTO else min(replicas, len(left))
    chosen = settle(_config({**options, "source": model, "tp": tp, "cores_per_rank": cores}, replicas))
    topology, groups = chosen.topology, min(chosen.replicas, len(left))
    recall_or_find(chosen.config.model, topology)  # refuses what cannot work
    options = {**options, "model": model, "tp": topology.tp, "cores": topology.cores_per_rank}

    from tpray.data.work import each, start_board
    from tpray.local_ray.local import ensure_ray, stop_ray

    with variable_set("RAY_BACKEND_LOG_LEVEL", "error"):  # else Ray warns of how its own library starts actors
        owns_ray = ensure_ray(max(core_count(), groups * topology.tp * topology.threads))
    try:
        board = start_board()
        with _Progress(console, board, {name: sources.sizes[name] for name in left}):
            for name, found in each(left, partial(_classify, job), options, groups, board):
                if error := found.get("error"):
                    totals.failed += 1
                    _say_failed(console, name, error)
                else:
                    totals.files += 1
                    totals.classified += found["classified"]
                    totals.refused += found["refused"]
    except BaseException:
        console.print(f"{totals}: go on with --resume", highlight=False, soft_wrap=True)
        raise
    finally:
        if owns_ray:
            stop_ray()
    return totals


def _check(sources: Sources, job: Job) -> tuple[list[str], dict[str, str]]:
    """What is left to do, and a sentence for each file that cannot be read.

    Raises:
        ConfigError: no file can be read; an output would be among the inputs, or cannot be written.
    """
    check_ray_data()
    out, base, written = job.out, _absolute(sources.base), f"{_absolute(job.out)}/"
    # What a first run writes beneath a folder a second one would read.
    is_read = sources.deep and written.startswith(f"{base}/") and _is_visible(written, base)
    if is_read or any(_absolute(name).startswith(written) for name in sources.sizes):
        raise ConfigError(f"--out {out} is where --in reads: name another folder")
    if is_url(out):
        file_system(out)
    elif not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {Path(out).absolute().parent} to make {Path(out).name} in")
    elif Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"--out {out} is a file, and --in names many: name a folder")
    with ThreadPoolExecutor(CHECKS) as threads:
        names = list(sources.sizes)
        if job.how.resume:
            done = threads.map(lambda name: exists(job.target(name)), names)
            names = [name for name, is_done in zip(names, done, strict=True) if not is_done]
        for name in names:
            check_partial(job.target(name), job.how.resume)
        problems = dict(zip(names, threads.map(lambda name: _problem(name, job.how.columns), names), strict=True))
    failed = {name: problem for name, problem in problems.items() if problem}
    if failed and len(failed) == len(sources.sizes):
        raise ConfigError(next(iter(failed.values())))
    return [name for name in names if name not in failed], failed


def _classify(job: Job, classifier: LocalClassifier, source: str, telling: Telling) -> dict[str, Any]:
    """On the group's machine: a file, and how many records it has; or why it cannot be done."""
    source, target = job.at(source), job.at(job.target(source))
    begun = telling.begin()  # by a group that was lost: what it has written is gone on with
    if not job.how.resume and not begun:
        discard(partial_file(target))
    try:
        if not is_url(target):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        how = replace(job.how, resume=True)
        counts = classify_file(
            classifier, source, target, Console(quiet=True), how, lambda _, reader: _Report(telling, reader)
        )
    except Exception as e:
        # What reads a file has errors of its own, of pyarrow's and of stores; those of a group end the whole.
        if isinstance(e, TprayError) and not isinstance(e, (ConfigError, StoreError)):
            raise
        return {"error": str(e).splitlines()[0] if str(e) else type(e).__name__}
    return {"classified": counts.classified + counts.kept, "refused": len(counts.refused)}


class _Report(Shown):
    """Tells how far a file is."""

    def __init__(self, telling: Telling, reader: Reader) -> None:
        self._telling, self._reader = telling, reader
        self._done, self._told = 0, time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._tell()

    def advance(self) -> None:
        self._done += 1
        if time.monotonic() - self._told > SAY_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._telling.say(self._done, self._reader.share() or 0.0)


class _Progress:
    """Says how far the files are, within a ``with`` block. sizes: of each, bytes."""

    def __init__(self, console: Console, board: Any, sizes: dict[str, int]) -> None:
        self._console, self._board, self._sizes = console, board, sizes
        self._status = console.status("Starting") if console.is_terminal else None
        self._over, self._started = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._show, name="tpray-progress", daemon=True)

    def __enter__(self) -> None:
        if self._status is not None:
            self._status.start()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._status is not None:
            self._status.stop()

    def _show(self) -> None:
        from tpray.data.work import said

        while not self._over.wait(LOG_EVERY_S if self._status is None else SAY_EVERY_S):
            try:
                found = said(self._board)
            except Exception:  # noqa: BLE001  # of a Ray that ends; whoever waits for the answers says so
                return
            if not found:
                continue  # the groups come up
            done = sum(count for count, _ in found.values())
            share = sum(self._sizes[name] * share for name, (_, share) in found.items())
            share /= max(1, sum(self._sizes.values()))
            text = said_of(done, "texts", time.monotonic() - self._started, 0.0, share)
            if self._status is not None:
                self._status.update(text)
            else:
                self._console.print(text, highlight=False, soft_wrap=True)


def _problem(source: str, columns: Columns) -> str:
    """Why a file cannot be read, as far as its beginning or its index shows; empty: it can."""
    try:
        with ExitStack() as stack:
            open_reader(source, columns, stack)
    except (TprayError, OSError, ValueError) as e:
        return str(e)
    return ""


def _config(options: Mapping[str, Any], replicas: int | Literal["auto"]) -> ServeConfig:
    model, parallel = (
        {name: options[name] for name in kind.model_fields if name in options} for kind in (ModelConfig, ParallelConfig)
    )
    return ServeConfig(
        model=ModelConfig(**model), parallel=ParallelConfig(**parallel), replicas=replicas, goal="throughput"
    )


def _say_failed(console: Console, name: str, problem: str) -> None:
    said = problem if name in problem else f"{name}: {problem}"
    console.print(f"not done: {said}", highlight=False, soft_wrap=True, markup=False)


def _absolute(name: str) -> str:
    name = name.removeprefix("file://")
    return name if is_url(name) else os.path.realpath(name)


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _is_visible(name: str, base: str) -> bool:
    return not any(part.startswith((".", "_")) for part in name.removeprefix(base).split("/"))


def _is_table(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in KINDS


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"
