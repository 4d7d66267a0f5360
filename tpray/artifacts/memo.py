"""Which artifact a checkpoint has, remembered from the last start, so that this one need not ask transformers again.

Like git's index, a note trusts a file whose size, times and inode are as they were. The change time among them is set
by the kernel alone, at every write and rename. What else decides which artifact it is, versions and code included, is
in the note's name: where anything differs there is no note, and `resolve` finds out anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpray.artifacts.key import code_digest
from tpray.artifacts.manifest import FORMAT, versions
from tpray.cache_files import write_whole
from tpray.config import cache_dir
from tpray.platforms.topology import Topology


def note_path(
    directory: Path, own: Sequence[Any], dtype: str, buckets: Sequence[tuple[int, int]], topology: Topology
) -> Path:
    """Where the note is of the checkpoint in ``directory``, as its files are now.

    Args:
        own: what else the user chose, as JSON. buckets: those that the user named.
    """
    cores = [topology.tp, topology.runtime, *topology.compiled_for, topology.fake]
    asked = [str(directory.resolve()), *own, dtype, [list(shape) for shape in buckets], cores]
    parts = json.dumps([FORMAT, stamps(directory), asked, code_digest(), versions(topology.runtime)], sort_keys=True)
    return cache_dir() / "notes" / hashlib.sha256(parts.encode()).hexdigest()[:32]


def stamps(directory: Path) -> list[list[Any]]:
    """Of each file in ``directory``: its name, size, time of change in ns, and what the kernel alone sets."""
    found = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_file():
            s = entry.stat()
            found.append([entry.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev])
    return found


def recall(note: Path) -> str | None:
    """The key of the artifact that ``note`` names; None if there is no such note."""
    try:
        return note.read_text()
    except (OSError, ValueError):
        return None


def remember(note: Path, key: str) -> None:
    """Write ``note``; where that cannot be done, the next start takes longer."""
    with suppress(OSError):
        write_whole(note, key)


def forget(note: Path) -> None:
    """Remove ``note``."""
    note.unlink(missing_ok=True)
