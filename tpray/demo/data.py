"""Sentence pairs for the demo: which sentences say the same thing, and which only look as if they did.

A *family* of sentences is a list of *meanings* that share their words but contradict each other (a price
rose, fell, or did not change); a meaning is a list of *phrasings* that are paraphrases of one another. Syntax
of the tables in ``tpray.demo.phrases``:

* a blank line separates families, ``--`` separates the meanings of one family;
* ``? `` starts a phrasing that is kept for evaluation and never trained on;
* ``[a|b|]`` chooses one alternative; ``{city}`` and ``{city2}`` are places for two different draws of that
  kind, ``{cook.past}`` asks for a form of a verb; ``{sentence}`` is a whole sentence of another family;
* ``@symmetric`` says that exchanging ``{x}`` and ``{x2}`` keeps the meaning.

A paraphrase is another phrasing (or other synonyms) of the same meaning about the same entities. What is not
a paraphrase: a sentence about something else, another statement about the same entities, the same statement
about another person, place or number, the same statement with its roles exchanged, and its contrary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from .phrases import TABLES
from .world import FORMS, Concept, Split, draw

_SLOT = re.compile(r"\{(\w+?)(\d?)(?:\.(\w+))?\}")
_CHOICE = re.compile(r"\[([^\]]*)\]")
_MAX_WORDS = 26  # of one sentence; a pair then fits the classifier's 128 positions
_RENAMED_SHARE = 0.3


@dataclass(frozen=True)
class Pair:
    """Two sentences, whether they are paraphrases (1) or not (0), and how the pair was made."""

    first: str
    second: str
    label: int
    kind: str


@dataclass(frozen=True)
class Meaning:
    """The phrasings of one statement, and the names of the slots they all fill."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    slots: tuple[str, ...]
    symmetric: bool

    def phrasings(self, split: Split) -> tuple[str, ...]:
        return self.trained if split == "train" else self.held_out


@dataclass(frozen=True)
class Family:
    meanings: tuple[Meaning, ...]

    @property
    def nested(self) -> bool:
        return "sentence" in self.meanings[0].slots


@dataclass(frozen=True)
class Statement:
    """One meaning with its slots filled: what a sentence says, apart from how it says it."""

    family: Family
    meaning: Meaning
    values: dict[str, Value]


Value = Concept | Statement


def _slot_names(phrasing: str) -> set[str]:
    return {kind + number for kind, number, _ in _SLOT.findall(phrasing)}


def _meaning(block: str) -> Meaning:
    lines = block.replace("@symmetric\n", "").splitlines()
    trained = tuple(line for line in lines if not line.startswith("? "))
    held_out = tuple(line[2:] for line in lines if line.startswith("? "))
    slots = _slot_names(lines[-1])
    for phrasing in trained + held_out:
        if _slot_names(phrasing) != slots:
            raise ValueError(f"{phrasing!r} does not use the slots {sorted(slots)} of its meaning")
    return Meaning(trained, held_out, tuple(sorted(slots)), symmetric="@symmetric" in block)


@cache
def families() -> tuple[Family, ...]:
    """Every family of the tables."""
    blocks = [block for table in TABLES for block in table.strip().split("\n\n")]
    return tuple(Family(tuple(_meaning(part) for part in block.split("\n--\n"))) for block in blocks)


def templates(split: Split) -> frozenset[str]:
    """Every phrasing that sentences of ``split`` may use."""
    return frozenset(p for f in families() for meaning in f.meanings for p in meaning.phrasings(split))


class Generator:
    """An endless, seeded source of pairs from one half of the world."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split: Split = split
        self.rng = random.Random(f"{split} {seed}")
        self.plain = [f for f in families() if not f.nested]
        self.quotable = [f for f in self.plain if not f.meanings[0].trained[0].endswith("?")]
        self.nested = [f for f in families() if f.nested]

    def pairs(self) -> Iterator[Pair]:
        """Pairs with alternating labels, in both orders."""
        makers = {
            1: ((self._identical, 7), (self._reworded, 93)),
            0: (
                (self._unrelated, 10), (self._same_entities, 10), (self._changed, 35), (self._swapped, 20),
                (self._contrary, 25),
            ),
        }  # fmt: skip
        label = 0
        while True:
            label = 1 - label
            functions, weights = zip(*makers[label], strict=True)
            make = self.rng.choices(functions, weights)[0]
            texts = make()
            while texts is None or any(len(text.split()) > _MAX_WORDS for text in texts):
                texts = make()
            if self.split == "train" and self.rng.random() < _RENAMED_SHARE:
                texts = self._renamed(texts)
            first, second = self.rng.sample(texts, 2)
            yield Pair(first, second, label, kind=make.__name__.strip("_"))

    # What a sentence says.

    def _value(self, slot: str, taken: dict[str, Value]) -> Value:
        """A draw for ``slot`` that shares no word with the slots filled already."""
        kind = slot.rstrip("0123456789")
        if kind == "sentence":
            return self._statement(self.rng.choice(self.quotable))
        used = {word for value in taken.values() if isinstance(value, tuple) for word in value}
        while True:
            concept = draw(kind, self.split, self.rng)
            if used.isdisjoint(concept):
                return concept

    def _statement(self, family: Family, meaning: Meaning | None = None) -> Statement:
        chosen = meaning or self.rng.choice(family.meanings)
        values: dict[str, Value] = {}
        for slot in chosen.slots:
            values[slot] = self._value(slot, values)
        return Statement(family, chosen, values)

    def _any_statement(self) -> Statement:
        return self._statement(self.rng.choice(self.nested if self.rng.random() < 0.08 else self.plain))

    # How it is said.

    def _say(self, statement: Statement, phrasing: str | None = None) -> str:
        text = phrasing or self.rng.choice(statement.meaning.phrasings(self.split))
        words = {
            slot: self.rng.choice(value) if isinstance(value, tuple) else (self._say(value).rstrip(".?"),)
            for slot, value in statement.values.items()
        }
        text = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)
        text = _SLOT.sub(lambda match: words[match[1] + match[2]][FORMS.get(match[3], 0)], text)
        text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", re.sub(r"\s+", " ", text)).strip()
        text = text[0].upper() + text[1:]
        return text if text.endswith("?") or self.rng.random() < 0.6 else text + "."

    # Pairs; None when this draw offers no such pair.

    def _identical(self) -> list[str]:
        text = self._say(self._any_statement())
        return [text, text]

    def _reworded(self) -> list[str] | None:
        statement = self._any_statement()
        phrasings = statement.meaning.phrasings(self.split)
        if len(phrasings) > 1 and self.rng.random() < 0.9:
            return [self._say(statement, phrasing) for phrasing in self.rng.sample(phrasings, 2)]
        phrasing = self.rng.choice(phrasings)
        return [self._say(statement, phrasing), self._say(statement, phrasing)]

    def _unrelated(self) -> list[str] | None:
        one, other = self._any_statement(), self._any_statement()
        return None if one.family is other.family else [self._say(one), self._say(other)]

    def _same_entities(self) -> list[str] | None:
        """Two families that say different things about the same entities."""
        one, other = (self._statement(self.rng.choice(self.plain)) for _ in range(2))
        shared = one.values.keys() & other.values.keys()
        if one.family is other.family or not shared:
            return None
        kept = {slot: one.values[slot] if slot in shared else value for slot, value in other.values.items()}
        return [self._say(one), self._say(replace(other, values=kept))]

    def _changed(self) -> list[str]:
        """Another person, place, number or verb, in the same phrasing half of the time."""
        statement = self._any_statement()
        return self._say_alike(statement, self._altered(statement))

    def _altered(self, statement: Statement) -> Statement:
        slot = self.rng.choice(statement.meaning.slots)
        value = statement.values[slot]
        other = self._altered(value) if isinstance(value, Statement) else self._value(slot, statement.values)
        return replace(statement, values={**statement.values, slot: other})

    def _swapped(self) -> list[str] | None:
        statement = self._any_statement()
        slots = [slot for slot in statement.meaning.slots if slot + "2" in statement.values]
        if not slots or statement.meaning.symmetric:
            return None
        values = statement.values
        slot = self.rng.choice(slots)
        exchanged = {**values, slot: values[slot + "2"], slot + "2": values[slot]}
        return self._say_alike(statement, replace(statement, values=exchanged))

    def _contrary(self) -> list[str] | None:
        statement = self._any_statement()
        others = [m for m in statement.family.meanings if m is not statement.meaning]
        if not others:
            return None
        other = self._statement(statement.family, self.rng.choice(others))
        kept = {slot: statement.values.get(slot, value) for slot, value in other.values.items()}
        return [self._say(statement), self._say(replace(other, values=kept))]

    def _renamed(self, texts: list[str]) -> list[str]:
        """One word of both sentences replaced by the same made-up word: what counts is that they agree on it."""
        shared = set.intersection(*(set(re.findall(r"\w+", text)) for text in texts))
        if not shared:
            return texts
        pattern = re.compile(rf"\b{self.rng.choice(sorted(shared))}\b")
        ((name,),) = draw("noun", self.split, self.rng)
        return [pattern.sub(name, text) for text in texts]

    def _say_alike(self, one: Statement, other: Statement) -> list[str]:
        phrasing = self.rng.choice(one.meaning.phrasings(self.split)) if self.rng.random() < 0.5 else None
        return [self._say(one, phrasing), self._say(other, phrasing)]


def training_pairs(seed: int) -> Iterator[Pair]:
    """An endless stream of pairs to train on."""
    return Generator("train", seed).pairs()


def held_out_pairs(seed: int = 0, count: int = 2000) -> list[Pair]:
    """``count`` pairs, half of them paraphrases, of entities and phrasings that no training pair uses."""
    source = Generator("held_out", seed).pairs()
    return [next(source) for _ in range(count)]
