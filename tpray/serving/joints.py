"""Where a text can be taken apart so that its parts have, one after another, the tokens of the whole.

A tokenizer splits a text into words before its model sees them. Between two letters with one space between them, most
tokenizers always split; some do so between any two punctuation marks, Chinese characters, or amino acids. Whether one
does is not read from its settings, but asked: it is given texts whole and in two parts, and has to make the same of
both. A tokenizer that does not, such as a BPE over whole texts, has no joints, and its texts are tokenised whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

TokensOf = Callable[[Sequence[str]], list[list[int]]]
"""The token ids of each text by itself, without special tokens."""

WordsOf = Callable[[str], list[str]]
"""The normalised words of a text that reach the model one by one."""

# Letters and digits that no normaliser joins to a neighbour: neither marks nor the parts of Hangul syllables.
_PLAIN = "0-9A-Za-zÀ-ÖØ-öø-ɏΑ-Ρα-ωЀ-ҁҊ-ԯא-תء-يऄ-हぁ-ゖァ-ヺ一-鿿가-힣"  # noqa: RUF001
_SPACE = f"(?<=[{_PLAIN}]) (?=[{_PLAIN}])"
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_TIGHT = (f"[{re.escape(_MARKS)}]", "[ACDEFGHIKLMNPQRSTVWY]", "[一-鿿]")  # the letters are those of proteins

_EDGES = (
    "a", "Paris", "QUICK", "x9", "42", "naïve", "École", "мир", "λόγος", "你好", "かな", "カナ", "한국어", "שלום",
    "سلام",
)  # fmt: skip
"""Words that begin and end with letters that a joint may be between."""

_WORDS = (
    *_EDGES, "the", "don't", "e.g.", "U.S", "a,b", "well-known", "(a)", "!?", "...", "“so”", "—", "🙂", "e\u0301", "½",
    " ", "\n", "\t", "``", "''",
)  # fmt: skip
_PROBES = 60
"""Random texts that a tokenizer is asked about, besides every pair of `_EDGES`."""


class Joints:
    """The joints of one tokenizer.

    Args:
        tokens_of: asks the tokenizer.
        words_of: asks it for words; None: it does not say, and its tokens have to do.
        added: its added tokens; no joint may be inside one.
        greedy: whether an added token takes the space behind it, or depends on its neighbours.
    """

    def __init__(self, tokens_of: TokensOf, words_of: WordsOf | None, added: Iterable[str], greedy: bool) -> None:
        self._tokens_of, self._words_of = tokens_of, words_of
        found = []
        spaced = any(not token.isspace() and re.search(r"\s", token) for token in added)
        if not greedy and not spaced and self._splits(_probes()):
            found.append(_SPACE)
        if found and words_of is not None:  # tokens alone prove nothing here: rare neighbours may make no word
            kinds = [f"(?<={kind})(?={kind})" for kind in _TIGHT]
            found += [
                joint
                for kind, joint in zip(_TIGHT, kinds, strict=True)
                if not any(re.search(joint, token) for token in added) and self._splits(_tight_probes(kind))
            ]
        self._joint = re.compile("|".join(found)) if found else None

    def _splits(self, probes: Iterable[tuple[str, str]]) -> bool:
        """Whether each pair of parts has the words and the tokens of the whole."""
        for first, second in probes:
            if self._words_of is not None:
                whole, left, right = (self._words_of(text) for text in (first + second, first, second))
                if whole != left + right:
                    return False
            ids, left_ids, right_ids = self._tokens_of([first + second, first, second])
            if ids != left_ids + right_ids:
                return False
        return True

    def parts(self, text: str, size: int, largest: int, from_end: bool = False) -> Iterator[str]:
        """The parts of ``text`` from its start, or from its end.

        The first has about ``size`` characters, each twice as many as the one before, up to ``largest``; but a part
        goes on until there is a joint.
        """
        left, right = 0, len(text)
        while left < right:
            end = self._before(text, right - size, left) if from_end else self._behind(text, left + size, right)
            yield text[end:right] if from_end else text[left:end]
            left, right = (left, end) if from_end else (end, right)
            size = min(2 * size, largest)

    def _behind(self, text: str, start: int, end: int) -> int:
        """The first joint from ``start`` on; ``end`` if there is none."""
        found = self._joint.search(text, start, end) if self._joint and start < end else None
        return found.start() if found else end

    def _before(self, text: str, start: int, end: int) -> int:
        """The last joint before ``start``; ``end`` if there is none."""
        reach = 256
        while self._joint and start > end:
            found = [match.start() for match in self._joint.finditer(text, max(end + 1, start - reach), start)]
            if found:
                return found[-1]
            start, reach = start - reach + 1, reach * 2
        return end


@dataclass(slots=True)
class Reading:
    """The tokens of a text, read from one end as far as they matter.

    ids: what was read. unread: the tokens of its other parts, in their order from that end; None: there are none.
    """

    ids: list[int]
    unread: Iterator[list[int]] | None = None
    from_end: bool = False

    def read(self, beyond: int) -> None:
        """Read until there are more than ``beyond`` tokens, or all."""
        while self.unread is not None and len(self.ids) <= beyond:
            part = next(self.unread, None)
            if part is None:
                self.unread = None
            else:
                self.ids = part + self.ids if self.from_end else self.ids + part

    def cut(self, length: int) -> list[int]:
        """The ``length`` tokens at that end."""
        return self.ids[len(self.ids) - length :] if self.from_end else self.ids[:length]


def _probes() -> Iterator[tuple[str, str]]:
    """Texts that are to be split at a space."""
    for before in _EDGES:
        for behind in _EDGES:
            yield before, " " + behind
    random = Random(7)
    for _ in range(_PROBES):
        first, second = (
            "".join(random.choice(_WORDS) + random.choice(("", " ", "  ")) for _ in range(random.randrange(8)))
            for _ in range(2)
        )
        yield first + random.choice(_EDGES), " " + random.choice(_EDGES) + second


def _tight_probes(kind: str) -> Iterator[tuple[str, str]]:
    """Texts that are to be split between any two characters of a kind."""
    random = Random(7)
    chinese = [chr(random.randrange(0x4E00, 0x9FFF)) for _ in range(24)]
    letters = [chr(code) for code in range(32, 127)] + chinese
    members = [letter for letter in letters if re.fullmatch(kind, letter)]
    for before in members:
        for behind in members:
            yield f"A {before}{before}", f"{behind}{behind} A"
