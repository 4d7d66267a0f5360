"""The files of a checkpoint. No torch: whoever only looks at files need not wait for its import."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf",
    "*.tflite", "*.mlmodel", "*.npz",
)  # fmt: skip
"""How files of weights end, in the formats that lie on the Hub."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
