"""The embedded demo: a small paraphrase classifier, its tokenizer and the script that trains both."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
