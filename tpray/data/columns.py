"""What records are called: where their texts are, and what they are given."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tpray.chat import Chat
from tpray.errors import ConfigError, InputError
from tpray.installation import install_command
from tpray.tokenizer import Item

ADDED = ("label", "score", "scores", "entities", "error")
"""What a record is given. Where it has one of these already, all of them get the prefix ``tpray_``."""


@dataclass(frozen=True)
class Columns:
    """What the texts are called: keys of JSON lines, columns of tables. pair: None is ``text_pair``, if any."""

    text: str = "text"
    pair: str | None = None

    def item(self, record: dict[str, Any]) -> Item:
        """What is to be classified of a record.

        Raises:
            InputError: it has no text.
        """
        if "messages" in record and self.text not in record:
            return Chat.of(record["messages"], 0)
        text, second = record.get(self.text), record.get(self.pair or "text_pair")
        missing = self.pair is not None and second is None
        if not isinstance(text, str) or not isinstance(second, str | None) or missing:
            has = "has" if self.pair else "may have"
            raise InputError(
                f'needs a "{self.text}", and {has} a "{self.pair or "text_pair"}", both strings; or "messages", which '
                "are a conversation",
                0,
            )
        return text if second is None else (text, second)

    def read_of(self, there: Iterable[str]) -> list[str]:
        """The columns that are read, of those that are ``there``."""
        wanted = (self.text, self.pair or "text_pair", "messages")
        return [name for name in dict.fromkeys(wanted) if name in there]

    def check(self, there: list[str], source: str, flags: tuple[str, str] = ("--text-column", "--pair-column")) -> None:
        """Refuse a table without the columns that are read.

        Args:
            flags: how the columns of the text and of the pair are named.

        Raises:
            ConfigError: one is not among those that are ``there``.
        """
        for flag, name in zip(flags, (self.text, self.pair), strict=True):
            if name is not None and name not in there and not (name == "text" and "messages" in there):
                known = ", ".join(there) or "none"
                raise ConfigError(f"{source} has no column {name!r}, but {known}: name one with {flag}")


def prefix_of(names: Container[str]) -> str:
    """What the names of `ADDED` get so that none is among ``names``."""
    prefix = ""
    while any(prefix + name in names for name in ADDED):
        prefix += "tpray_"
    return prefix


def arrow_types() -> dict[str, Any]:
    """Of the columns of `ADDED`, as pyarrow has them."""
    import pyarrow as pa

    scores = pa.list_(pa.struct({"label": pa.string(), "score": pa.float64()}))
    entity = {"entity": pa.string(), "entity_group": pa.string(), "score": pa.float64(), "word": pa.string()}
    places = {"index": pa.int64(), "start": pa.int64(), "end": pa.int64(), "logits": pa.list_(pa.float64())}
    entities = pa.list_(pa.struct(entity | places))
    types = {"label": pa.string(), "score": pa.float64(), "scores": scores, "entities": entities, "error": pa.string()}
    return {name: types[name] for name in ADDED}


def check_ray_data() -> None:
    """Refuse, before anything is started, what Ray Data cannot do.

    Raises:
        ConfigError: a package that it needs is missing.
    """
    missing = [name for name in ("pandas", "pyarrow") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"Ray Data needs {' and '.join(missing)}: {install_command('data')}")
