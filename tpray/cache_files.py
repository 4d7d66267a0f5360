"""Small files of the cache: what a start has found out, for the next one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

KEPT_FILES = 64
"""How many files a folder of the cache holds that `write_whole` writes to: each saves a start some seconds, no more."""


def write_whole(path: Path, text: str) -> None:
    """Write a file of the cache so that a reader sees all of it or none; its folder is made when missing.

    Of the files in its folder only the `KEPT_FILES` that were written last are kept.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    with suppress(OSError):  # whoever writes at the same time removes the same
        for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime_ns)[:-KEPT_FILES]:
            old.unlink()
