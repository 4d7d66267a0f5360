"""What a codec has learned from transformers' tokenizer, kept on this machine for the next start.

With it a start needs neither transformers nor torch to tokenise. The texts in the artifact's manifest, with the ids
that transformers gave them, are compared at every start all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tpray.artifacts.manifest import FileRecord
from tpray.cache_files import write_whole
from tpray.config import cache_dir
from tpray.serving.template import Template
from tpray.tokenizer import Encoded

_CODE = ("codec.py", "joints.py", "template.py", "tokenizer_facts.py", "../tokenizer.py", "../chat.py")
"""The modules that learn the facts and use them."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What the codec asks transformers' tokenizer for.

    max_length: tokens of the longest row. side: the end that is cut. fast: whether the tokenizer has a compiled half.
    special_split: its special tokens are split like other text. added: its added tokens. greedy: one of these takes
    the space behind it, or is a whole word. templates: of a text and of a pair; none: transformers makes rows whole.
    chat_template: of a conversation, if there is one. special: the special tokens that it may use, by their names.
    compiled: the compiled half as JSON, if it gives what transformers gives.
    """

    max_length: int
    side: Literal["Left", "Right"]
    fast: bool
    special_split: bool
    added: tuple[str, ...]
    greedy: bool
    templates: tuple[Template, ...]
    chat_template: str | None
    special: dict[str, str]
    compiled: str | None

    def tokenizer(self) -> Any:
        """The compiled half, a ``tokenizers.Tokenizer``; None without one."""
        if self.compiled is None:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.compiled)
        tokenizer.encode_special_tokens = self.special_split
        return tokenizer

    def to_json(self) -> str:
        """For `of_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> TokenizerFacts:
        """What `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it did not.
        """
        stored = json.loads(text)
        templates = tuple(
            Template(tuple(Encoded(**row) for row in each["around"]), tuple(each["types"]))
            for each in stored.pop("templates")
        )
        return cls(**stored | {"added": tuple(stored["added"])}, templates=templates)


def facts_path(files: Mapping[str, FileRecord], max_length: int) -> Path:
    """Where the facts are kept of a tokenizer with these files, whose model takes rows of ``max_length`` tokens."""
    hashes = [f"{name} {record.sha256}" for name, record in sorted(files.items())]
    versions = [version("transformers"), version("tokenizers"), _code_digest()]
    parts = "\n".join([*hashes, str(max_length), *versions])
    return cache_dir() / "tokenizers" / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"


@cache
def _code_digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _CODE)).hexdigest()


def read_facts(path: Path) -> TokenizerFacts | None:
    """The facts in ``path``; None if there are none that can be read, or these are damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        return TokenizerFacts.of_json(text) if digest == _digest(text) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def keep_facts(path: Path, facts: TokenizerFacts) -> None:
    """Write ``path``, if the facts are all that a start needs; where it cannot be written, the next takes longer."""
    if facts.compiled is None:
        return
    text = facts.to_json()
    with suppress(OSError):
        write_whole(path, f"{_digest(text)}\n{text}")
