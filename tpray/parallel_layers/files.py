"""The files of a checkpoint. No torch: whoever only looks at files need not wait for its import."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf",
    "*.tflite", "*.mlmodel", "*.npz",
)  # fmt: skip
"""How files of weights end, in the formats that lie on the Hub."""


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read. ValueError: it is not JSON, or deeper than Python reads it.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
