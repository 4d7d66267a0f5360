"""The files of a checkpoint. No torch: whoever only looks at files need not wait for its import."""

from __future__ import annotations

import hashlib
from pathlib import Path

TEXT_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "sentencepiece*", "spiece.model", "*.bpe.model",
)  # fmt: skip
"""What a tokenizer may consist of, in any of transformers' layouts."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
