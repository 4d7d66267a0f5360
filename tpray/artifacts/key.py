"""The content address of an artifact: a digest of everything that shapes a program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tpray.artifacts.manifest import FORMAT, versions
from tpray.platforms.topology import Topology
from tpray.runtime.buckets import Bucket

if TYPE_CHECKING:
    from tpray.parallel_layers.checkpoint import Checkpoint

SHAPING_CODE = ("parallel_layers", "runtime")
"""The packages of tpray whose code shapes a program."""


def cache_key(checkpoint: Checkpoint, topology: Topology, dtype: str, buckets: Sequence[Bucket]) -> str:
    """The same key means the same programs. Reads every weight once."""
    plan = json.dumps(checkpoint.plan.to_json(), sort_keys=True)
    shapes = ",".join(map(str, buckets))
    cores = " ".join(map(str, (*topology.compiled_for, *(["fake"] if topology.fake else []))))
    own = [str(FORMAT), checkpoint.digest, plan, str(topology.tp), dtype, topology.runtime, shapes, cores]
    parts = [*own, code_digest(), *versions(topology.runtime).values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@cache
def code_digest(root: Path = Path(__file__).parents[1]) -> str:
    """Of the code that shapes a program, so that a changed plan or layer never meets an old artifact."""
    files = sorted(path for package in SHAPING_CODE for path in (root / package).rglob("*.py"))
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()
