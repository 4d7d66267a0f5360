"""How large a model's weights are, and whether they fit this machine's memory and a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from tpray.errors import ConfigError
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.parallel_layers.weights import bytes_per_weight
from tpray.platforms.memory import available_bytes

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 2}
"""Of a weight; int8's are read in bfloat16."""


def bytes_in(checkpoint: Checkpoint, dtype: str) -> int:
    """How large a checkpoint's weights are in ``dtype``, bytes.

    Raises:
        CheckpointError: its configuration is damaged.
    """
    stored = checkpoint.stored_config()
    said = BYTES.get(str(stored.get("dtype") or stored.get("torch_dtype")), 4)  # newer and older transformers
    total = 0
    for path in checkpoint.files:
        width = bytes_per_weight(path) or said
        total += int(path.stat().st_size / width * BYTES[dtype])
    return total


def check_memory(needed: int, name: str) -> None:
    """Refuse what cannot fit: a group holds its weights once, all ranks together.

    Raises:
        ConfigError: with both figures.
    """
    available = available_bytes()
    if needed > available:
        raise ConfigError(
            f"the weights of {name} are {needed / 2**30:.1f} GiB and this machine has {available / 2**30:.1f} GiB of "
            "memory available: free some, or use a larger machine"
        )


def check_disk(needed: int, name: str, directory: Path) -> None:
    """Refuse to trace where the artifact, which holds every weight once, cannot fit.

    Raises:
        ConfigError: with both figures.
    """
    there = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"{name} must be traced, which takes {needed / 2**20:.0f} MiB, and the disk of {directory} "
            f"has {free / 2**20:.0f} MiB left: free some, or set TPRAY_CACHE to another folder"
        )
