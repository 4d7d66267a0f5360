"""Artifacts at a URL: one machine traces, many serve.

Any file system that fsspec knows works: ``s3://``, ``gs://``, ``file://``. An artifact's manifest is written last and
read first, so that a reader never takes half of one; a machine copies it once, under a lock that the kernel drops when
its holder dies, and checks its hashes as those of any other.

A `SharedStore` is a folder at a URL in which each artifact has the name of its cache key: what one group traced, every
other starts from. One traces while the others wait, by a lock that is an object beside the artifact's folder: made only
if it is absent, renewed while its holder works, and taken away by whoever has watched it stay the same for `STALE_S`,
so that a holder that crashed holds up nobody for longer. No clocks are compared.

Source: https://filesystem-spec.readthedocs.io; the mode ``x`` of `open` is O_EXCL on a disk and a conditional write on
S3 and GCS. (``pipe_file(mode="create")`` looks first and then writes, on a disk.)
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpray.artifacts.folder import is_artifact
from tpray.artifacts.manifest import MANIFEST_FILE
from tpray.config import cache_dir, local_directory
from tpray.errors import ConfigError, ModelNotFoundError, StoreError, TprayError
from tpray.installation import install_command

log = logging.getLogger(__name__)

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of tpray for URLs of a kind."""

SIGNATURE_FILE = "manifest.sig"
"""See `tpray.artifacts.signature`."""


@dataclass(frozen=True)
class Copied:
    """What was copied to this machine. started, ended: `time.monotonic`."""

    url: str
    size_bytes: int
    started: float
    ended: float


COPIED: ContextVar[list[Copied] | None] = ContextVar("copied", default=None)
"""Where whoever waits for copies wants them noted."""

POLL_S = 1.0
RENEW_S = 10.0
STALE_S = 60.0


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL rather than a directory or a Hub id."""
    return "://" in name


def fetch(url: str) -> Path:
    """The local copy of the artifact at ``url``, made now if this machine has none of what is there.

    Raises:
        ModelNotFoundError: there is none.
        StoreError: the URL cannot be reached or read now.
        ConfigError: fsspec lacks a package for such URLs.
    """
    files, path = file_system(url)
    with _asking(url):
        try:
            manifest: bytes = files.cat_file(f"{path}/{MANIFEST_FILE}")
        except FileNotFoundError as e:
            raise ModelNotFoundError(f"there is no artifact at {url}: it has no {MANIFEST_FILE}") from e
        signature = b""
        with suppress(FileNotFoundError):
            signature = files.cat_file(f"{path}/{SIGNATURE_FILE}")
    target = cache_dir() / "fetched" / hashlib.sha256(url.encode() + manifest + signature).hexdigest()[:24]
    _copy_once(files, path, target, url)
    return target


def directory_of(source: str | None) -> Path:
    """Where a model lies, or would lie, on this machine; what a URL names is fetched. source: as the user named it.

    Raises:
        As `fetch`.
    """
    return fetch(source) if source is not None and is_url(source) else local_directory(source)


def put_file(file: Path, url: str) -> None:
    """Copy a file into the folder at ``url``.

    Raises:
        StoreError: it cannot be written there.
    """
    files, path = file_system(url)
    with _asking(url):
        files.put_file(str(file), f"{path}/{file.name}")


def has_file(file: Path, url: str) -> bool:
    """Whether the folder at ``url`` has a file of the same name and content.

    Raises:
        StoreError: it cannot be read.
    """
    files, path = file_system(url)
    with _asking(url):
        return bool(files.cat_file(f"{path}/{file.name}") == file.read_bytes())


def was_fetched(directory: Path) -> bool:
    """Whether the artifact in ``directory`` may be a store's, and not this machine's own."""
    return _lock_of(directory).exists()


def _lock_of(target: Path) -> Path:
    """What is locked while ``target`` is fetched; it stays."""
    return target.parent / f".{target.name}.fetching.lock"


class Claim:
    """The right to trace what nobody else traces now; ``lost`` once somebody took it for a crashed holder's."""

    def __init__(self) -> None:
        self.lost = False


class SharedStore:
    """The artifacts below ``url``, each in a folder that its key names.

    Raises:
        ConfigError: fsspec lacks a package for such URLs, or it is not a URL.
    """

    def __init__(self, url: str) -> None:
        if not is_url(url):
            raise ConfigError(f"{url!r} is not the URL of a store: give s3://, gs:// or file://, and a folder")
        self._url = url.rstrip("/")
        self._files, self._path = file_system(self._url)

    def url_of(self, key: str) -> str:
        """Where the artifact called ``key`` is, or will be."""
        return f"{self._url}/{key}"

    def has(self, key: str) -> bool:
        """Whether the store has the artifact called ``key``."""
        with _asking(self._url):
            return bool(self._files.exists(f"{self._path}/{key}/{MANIFEST_FILE}"))

    def fetch(self, key: str, target: Path) -> bool:
        """Copy the artifact called ``key`` to the folder ``target``, unless that is there; whether there is one.

        Raises:
            StoreError: there is one, and it cannot be read.
        """
        found = self.has(key)
        if found:
            _copy_once(self._files, f"{self._path}/{key}", target, self.url_of(key))
        return found

    def publish(self, directory: Path, key: str) -> None:
        """Copy the artifact in ``directory`` to the store, its manifest last.

        Raises:
            StoreError: it cannot be written there.
        """
        names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
        names.sort(key=lambda name: name == MANIFEST_FILE)
        started = time.perf_counter()
        with _asking(self._url):
            if self.has(key):  # a damaged one, which nobody is to take while its files change
                self._files.rm_file(f"{self._path}/{key}/{MANIFEST_FILE}")
            for name in names:
                target = f"{self._path}/{key}/{name}"
                self._make_folder_of(target)
                self._files.put_file(str(directory / name), target)
        log.info("published %s in %.2f s", self.url_of(key), time.perf_counter() - started)

    @asynccontextmanager
    async def claim(self, key: str, wait: bool = True) -> AsyncIterator[Claim]:
        """Within the block nobody else, on any machine, has the claim to ``key``.

        wait: for whoever has it; else a claim that somebody has is lost from the start.

        Raises:
            StoreError: the store cannot be written, or cannot create an object only if it is absent.
        """
        lock, owner = f"{self._path}/{key}.lock", f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"
        claim, ended = Claim(), asyncio.Event()
        if wait:
            await self._acquire(lock, owner)
        elif not await asyncio.to_thread(self._create, lock, owner):
            claim.lost = True
            yield claim
            return
        renewing = asyncio.get_running_loop().create_task(self._renew(lock, owner, claim, ended))
        try:
            yield claim
        finally:
            ended.set()
            await renewing  # not cancelled: a renewal under way would come after the removal
            await asyncio.to_thread(self._remove, lock, owner)

    async def _acquire(self, lock: str, owner: str) -> None:
        last, since = b"", time.monotonic()
        while not await asyncio.to_thread(self._create, lock, owner):
            seen = await asyncio.to_thread(self._read, lock)
            if seen != last:
                if not last:
                    log.info("waiting for %s, who traces the same", _owner(seen))
                last, since = seen, time.monotonic()
            elif time.monotonic() - since > STALE_S:
                log.warning("%s has not renewed its lock %s for %.0f s: it is taken over", _owner(seen), lock, STALE_S)
                await asyncio.to_thread(self._remove, lock, _owner(seen))
            await asyncio.sleep(POLL_S)

    async def _renew(self, lock: str, owner: str, claim: Claim, ended: asyncio.Event) -> None:
        beats = 0
        while not claim.lost:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended.wait(), RENEW_S)
            if ended.is_set():
                return
            beats += 1
            try:
                if _owner(await asyncio.to_thread(self._read, lock)) == owner:
                    await asyncio.to_thread(self._files.pipe_file, lock, _content(owner, beats))
                else:
                    log.warning("the lock %s was taken over by another group", lock)
                    claim.lost = True
            except Exception as e:  # noqa: BLE001  # every file system has errors of its own; the next beat may do
                log.warning("the lock %s was not renewed: %s", lock, e)

    def _create(self, lock: str, owner: str) -> bool:
        with _asking(self._url):
            self._make_folder_of(lock)
            try:
                with self._files.open(lock, "xb") as file:
                    file.write(_content(owner, 0))
            except OSError as e:
                if isinstance(e, FileExistsError) or _is_conflict(e):
                    return False
                raise
        return True

    def _make_folder_of(self, path: str) -> None:
        """Where there are folders: on an object store it would make the bucket."""
        protocols = {self._files.protocol} if isinstance(self._files.protocol, str) else set(self._files.protocol)
        if protocols.isdisjoint(("s3", "gs")):
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _read(self, lock: str) -> bytes:
        with _asking(self._url), suppress(FileNotFoundError):
            content: bytes = self._files.cat_file(lock)
            return content
        return b""

    def _remove(self, lock: str, owner: str) -> None:
        """Remove the lock if it is ``owner``'s; another's stays."""
        if _owner(self._read(lock)) == owner:
            with _asking(self._url), suppress(FileNotFoundError):
                self._files.rm_file(lock)


def _is_conflict(error: OSError) -> bool:
    """Whether S3 refused a conditional write because of another one at the same time; s3fs has no error for that."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("ConditionalRequestConflict", "PreconditionFailed")


def _content(owner: str, beats: int) -> bytes:
    return json.dumps({"owner": owner, "beats": beats}).encode()


def _owner(content: bytes) -> str:
    try:
        return str(json.loads(content)["owner"])
    except (ValueError, KeyError, TypeError):  # being written, or nobody's
        return "somebody"


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Translate what a file system raises: every one has errors of its own."""
    try:
        yield
    except TprayError:
        raise
    except Exception as e:
        raise StoreError(f"the store {url} cannot be used: {type(e).__name__}: {e}") from e


def _copy_once(files: Any, path: str, target: Path, url: str) -> None:
    """Copy the artifact at ``path`` to ``target``, unless it is there, whole or not at all.

    Raises:
        StoreError: it cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(target).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_artifact(target):
            return
        started, size = time.monotonic(), 0
        staging = target.with_name(f".{target.name}.fetching")
        shutil.rmtree(staging, ignore_errors=True)  # of one who crashed: the lock is ours
        try:
            for name in files.find(path):
                own = staging / _below(name, path)
                own.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(own))
                size += own.stat().st_size
            staging.rename(target)
        except Exception as e:
            raise StoreError(f"the artifact at {url} cannot be copied: {type(e).__name__}: {e}") from e
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        copied = Copied(url, size, started, time.monotonic())
        if (noted := COPIED.get()) is not None:
            noted.append(copied)
        log.info("fetched %s, %.1f MB in %.2f s", url, size / 1e6, copied.ended - started)


def _below(name: str, path: str) -> str:
    """A file's name in the folder ``path``.

    Raises:
        StoreError: it would be outside of it: an object store takes any name, ``..`` among them.
    """
    below = name.removeprefix(f"{path}/")
    if below == name or below.startswith("/") or ".." in below.split("/"):
        raise StoreError(f"it has a file {name!r}, which would be written outside of the artifact's folder")
    return below


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there.

    Raises:
        ConfigError: fsspec lacks a package for such URLs, or does not know them.
    """
    import fsspec

    try:
        # No listings are kept: what another machine has written since would not be in them.
        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as e:
        extra = EXTRAS.get(url.partition("://")[0])
        mend = f"{e}" if extra is None else install_command(extra)
        raise ConfigError(f"{url} needs another package: {mend}") from e
    except ValueError as e:
        raise ConfigError(f"{url} cannot be opened: {e}") from e
    return files, str(path).rstrip("/")
