"""Artifacts at a URL: one machine traces, many serve.

Any file system that fsspec knows will do: ``s3://``, ``gs://``, ``file://``. The manifest is written last and read
first, so that a reader never takes half an artifact; on each machine it is copied once, under a lock that the kernel
drops when its holder dies, and its hashes are checked as those of any other.

Source: https://filesystem-spec.readthedocs.io
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from tpray.config import cache_dir
from tpray.errors import ConfigError, ModelNotFoundError
from tpray.runtime.artifact import MANIFEST_FILE, is_artifact

log = logging.getLogger("tpray.group.remote")


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL rather than a directory or a Hub id."""
    return "://" in name


def fetch(url: str) -> Path:
    """The local copy of the artifact at ``url``, made now if this machine has none of what is there.

    Raises:
        ModelNotFoundError: there is none, or it cannot be read.
        ConfigError: fsspec lacks a package for such URLs.
    """
    files, path = _open(url)
    try:
        manifest: bytes = files.cat_file(f"{path}/{MANIFEST_FILE}")
    except Exception as e:  # every file system has errors of its own
        raise ModelNotFoundError(f"no artifact can be read at {url}: {type(e).__name__}: {e}") from e
    key = hashlib.sha256(url.encode() + manifest).hexdigest()[:24]
    target = cache_dir() / "fetched" / key
    target.parent.mkdir(exist_ok=True)
    with (target.parent / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_artifact(target):
            return target
        started = time.perf_counter()
        staging = target.with_name(f".{key}.fetching")
        shutil.rmtree(staging, ignore_errors=True)  # of one who crashed: the lock is ours
        try:
            for name in files.find(path):
                own = staging / os.path.relpath(name, path)
                own.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(own))
            staging.rename(target)
        except Exception as e:
            raise ModelNotFoundError(f"the artifact at {url} cannot be copied: {type(e).__name__}: {e}") from e
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        log.info("fetched %s in %.2f s", url, time.perf_counter() - started)
    return target


def publish(directory: Path, url: str) -> None:
    """Copy the artifact in ``directory`` to ``url``, its manifest last.

    Raises:
        ConfigError: it cannot be written there; or fsspec lacks a package for such URLs.
    """
    files, path = _open(url)
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    names.sort(key=lambda name: name == MANIFEST_FILE)
    try:
        for name in names:
            target = f"{path}/{name}"
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.put_file(str(directory / name), target)
    except Exception as e:
        raise ConfigError(f"the artifact cannot be written to {url}: {type(e).__name__}: {e}") from e


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise ConfigError(f"{url} cannot be opened: {e}") from e
    return files, str(path).rstrip("/")
