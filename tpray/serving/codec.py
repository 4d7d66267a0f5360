"""Before the group: text to token ids. (After it: `scores`.)

An item is one text, a pair of texts that the model reads together, a conversation, or a text as token ids.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tpray.artifacts.manifest import ModelRecord
from tpray.chat import NO_TEMPLATE, Chat, ChatTemplate, Rendered, read_template, template_of
from tpray.errors import (
    DeadlineError,
    EmptyInputError,
    InputError,
    InputTooLongError,
    UnsupportedTaskError,
)
from tpray.serving.chunks import WHOLE, Chunks, check_count
from tpray.serving.joints import Joints, Reading
from tpray.serving.template import Template, kept
from tpray.serving.tokenizer_facts import TokenizerFacts
from tpray.tokenizer import (
    Encoded,
    Item,
    Plain,
    Tokens,
    check_text,
    check_vocabulary,
    load_tokenizer,
    longest_row,
    sample_items,
    stock_rows,
    texts_of,
)

Direction = Literal["Left", "Right"]


_BARE = Template((Encoded([], []), Encoded([], [])), (0,))
"""Of a text that holds its special tokens already."""

WHOLE_CHARS = 8192
"""A longer text is tokenised part by part, and no further than it matters. One that is not longer is tokenised whole,
so that its number of tokens is known."""

PART_CHARS = 1024
"""About how long the first part is; each is twice as long as the one before, up to `LARGE_CHARS`."""

LARGE_CHARS = 131_072
"""A longer part has no joint, and takes some 200 bytes a character for a while: tokenise one such text at a time."""


class TextCodec:
    """Tokenises items exactly as transformers does, for one model. Any thread may use it.

    The tokenizer's compiled half is called directly where it gives what transformers gives, and transformers itself
    where it does not: for tokenizers in Python, and for settings that live in transformers' own half. Either gives the
    tokens of single texts, without special ones. Here they are cut and the special ones added, in time linear in what
    is kept. (The compiled half keeps what it cuts off, for a pair in all combinations.)

    Args:
        directory: ``config.json`` and the tokenizer's files.
        record: the model's sizes, and what it is called.
        facts: what another codec of the same files has learned; transformers is then not imported.
        chat_template: a file that stands for the tokenizer's own chat template.

    Raises:
        CheckpointError: there is no tokenizer in ``directory`` that can be the model's.
    """

    def __init__(
        self,
        directory: Path,
        record: ModelRecord,
        facts: TokenizerFacts | None = None,
        chat_template: Path | None = None,
    ) -> None:
        self.record, self._directory, self._own_chat = record, directory, chat_template
        self.pad_id = record.pad_id
        self._lock = threading.Lock()  # transformers keeps how to cut as the tokenizer's state
        self.facts = facts or self._learn()
        self.max_length, self._own_side = self.facts.max_length, self.facts.side
        self._templates: tuple[Template, ...] = self.facts.templates
        self._compiled: Any = self.facts.tokenizer()
        self.compiled = self._compiled is not None
        """Whether the compiled half gives what transformers gives."""
        self._joints = self._find_joints()
        text = self.facts.chat_template
        self._chat = None if text is None else ChatTemplate(text, self.facts.special)

    @cached_property
    def _stock(self) -> Any:
        """transformers' tokenizer."""
        tokenizer = load_tokenizer(self._directory, self.record.source)
        check_vocabulary(tokenizer, self.record.vocab_size, self.record.source)
        if self._own_chat is not None:
            tokenizer.chat_template = read_template(self._own_chat)
        return tokenizer

    def _learn(self) -> TokenizerFacts:
        samples, chat_template = sample_items(self._stock), template_of(self._stock)
        if chat_template is not None:
            samples += [Rendered(text) for text in samples if isinstance(text, str)]
        expected = self._stock_rows(samples, None)
        for compiled in (self._compile(), None):
            self._compiled = compiled
            self._templates = self._learn_templates(samples, expected)
            if self._templates and [self._sample_row(item) for item in samples] == expected:
                break
        else:
            self._templates = ()  # its rows are not its texts' tokens in a template: transformers makes them whole
        added = list(self._stock.added_tokens_decoder.values())
        return TokenizerFacts(
            max_length=longest_row(self._stock, self.record.max_length),
            side="Left" if self._stock.truncation_side == "left" else "Right",
            fast=self._stock.is_fast,
            special_split=self._compiled is not None and self._compiled.encode_special_tokens,
            added=tuple(token.content for token in added),
            greedy=any(token.rstrip or token.single_word for token in added),
            templates=self._templates,
            chat_template=chat_template,
            special=dict(self._stock.special_tokens_map),
            compiled=None if self._compiled is None else self._compiled.to_str(),
        )

    def _compile(self) -> Any:
        from tokenizers import Tokenizer

        if not self._stock.is_fast:
            return None
        try:
            compiled = Tokenizer.from_str(self._stock.backend_tokenizer.to_str())
        except Exception:  # noqa: BLE001  # tokenizers raises no other class; it has a part in Python, as RoFormer's
            return None
        compiled.encode_special_tokens = self._stock.split_special_tokens
        compiled.no_padding()
        compiled.no_truncation()
        return compiled

    def _learn_templates(self, samples: Sequence[Plain], rows: Sequence[Encoded]) -> tuple[Template, ...]:
        """The templates of a text and of a pair, from the first sample of each; () if they have none."""
        templates = []
        for count in (1, 2):
            item, row = next(
                (item, row) for item, row in zip(samples, rows, strict=True) if len(texts_of(item)) == count
            )
            template = Template.of(row, self._tokens(texts_of(item)))
            if template is None:
                return ()
            templates.append(template)
        return tuple(templates)

    def _sample_row(self, item: Plain) -> Encoded:
        texts = texts_of(item)
        return self._template_of(texts).put(self._tokens(texts))

    def _template_of(self, texts: Sequence[str]) -> Template:
        return _BARE if isinstance(texts[0], Rendered) else self._templates[len(texts) - 1]

    def _find_joints(self) -> Joints:
        words_of: Callable[[str], list[str]] | None = None
        if self._compiled is not None:
            normalizer, splitter = self._compiled.normalizer, self._compiled.pre_tokenizer

            def words_of(text: str) -> list[str]:
                plain = text if normalizer is None else normalizer.normalize_str(text)
                return [plain] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(plain)]

        return Joints(self._tokens, words_of, self.facts.added, self.facts.greedy)

    def encode(
        self,
        items: Sequence[Item],
        truncate: bool = False,
        direction: Direction | None = None,
        deadline: float = math.inf,
        max_length: int | None = None,
    ) -> list[Encoded]:
        """Tokenise ``items``, special tokens added.

        Args:
            truncate: cut items that are longer than ``max_length`` tokens, at most and by default what the model takes.
            direction: the end that is cut; None: the one that the tokenizer's ``truncation_side`` names.
            deadline: give up then; `time.monotonic` seconds.

        Raises:
            EmptyInputError, InputError: an item without text, with characters no text has, or with tokens that the
                model does not know; a conversation that the chat template refuses.
            InputTooLongError: an item is too long and ``truncate`` is false.
            DeadlineError: ``deadline`` passed.
        """
        plain: list[Plain | Tokens] = [
            self._render(item, number, deadline) if isinstance(item, Chat) else item
            for number, item in enumerate(items)
        ]
        for number, item in enumerate(plain):
            for text in texts_of(item):
                check_text(text, number)
        way = (direction or self._own_side) if truncate else None
        rows = self._rows(plain, way, deadline, max_length or self.max_length)
        for number, row in enumerate(rows):
            self._check_row(row, number)
        return rows

    def encode_after(
        self,
        first: Sequence[str],
        seconds: Sequence[str],
        max_length: int,
        truncate: bool,
        direction: Direction | None = None,
        deadline: float = math.inf,
        chunks: Chunks = WHOLE,
        max_rows: float = math.inf,
        second_tokens: float = math.inf,
    ) -> list[list[Encoded]]:
        """The rows of many texts, each after the same one, or none, which is tokenised once, and never cut.

        Args:
            first: that text, if there is one. max_length: tokens of a row, at most the model's.
            truncate, direction, deadline: as for `encode`, of the second texts. chunks: how these are read.
            second_tokens: of a second text, none further is read.

        Raises:
            As `encode`; what is wrong with the first text alone is no item's. InputError: the stride is too large.
            PayloadTooLargeError: there are more than ``max_rows``.
        """
        way = (direction or self._own_side) if truncate else None
        if not self._templates:
            if chunks != WHOLE or not first:
                raise UnsupportedTaskError(
                    f"{self.record.source} has a tokenizer whose rows are not taken apart, so that its texts are not "
                    "read in chunks: set `truncate` in place of `chunks`"
                )
            rows = [[row] for row in self._stock_pairs(first[0], seconds, max_length, way)]
        else:
            template, left = self._templates[len(first)], (direction or self._own_side) == "Left"
            own = [self._reading(text, False, deadline) for text in first]
            for text in own:
                text.read(max_length)
            room = max_length - template.added - sum(len(text.ids) for text in own)
            if room < 1:
                raise self._no_room(max_length - room + 1, max_length)
            reach = int(min(chunks.reach(room), second_tokens))
            short = iter(self._tokens([text for text in seconds if len(text) <= WHOLE_CHARS]))
            rows, count = [], 0
            for number, second in enumerate(seconds):
                part = self._reading(second, left, deadline, short)
                part.read(reach)
                if len(part.ids) > reach and way is None and reach < second_tokens:
                    tokens, known = len(part.ids) + max_length - room, part.unread is None
                    raise self._too_long(tokens, known, number, max_length + reach - room, chunks)
                parts = chunks.cut(part.cut(min(reach, len(part.ids))), room, left)
                count += len(parts)
                check_count(count, max_rows)
                rows.append([template.put([*(text.ids for text in own), ids]) for ids in parts])
        for number, of_one in enumerate(rows):
            for row in of_one:
                self._check_row(row, number, max_length)
        return rows

    def _stock_pairs(self, first: str, seconds: Sequence[str], max_length: int, way: Direction | None) -> list[Encoded]:
        pairs = [(first, second) for second in seconds]
        (least,) = self._stock_rows([(first, seconds[0])], None)
        needed = len(least) - len(self._tokens([seconds[0]])[0]) + 1
        if needed > max_length:
            raise self._no_room(needed, max_length)
        return self._stock_rows(pairs, way, "only_second", max_length)

    @staticmethod
    def _no_room(tokens: int, max_length: int) -> InputTooLongError:
        return InputTooLongError(
            f"the query needs {tokens} tokens with a document of one, and this model takes {max_length}: shorten the "
            "query (of a pair, the first text); only documents are cut"
        )

    @property
    def ignores_case(self) -> bool:
        """Whether upper and lower case have the same tokens."""
        upper, lower = self._tokens(["THE FIRM", "the firm"])
        return upper == lower

    @property
    def takes_conversations(self) -> bool:
        """Whether there is a chat template."""
        return self._chat is not None

    def _render(self, chat: Chat, number: int, deadline: float) -> Rendered:
        if self._chat is None:
            raise InputError(NO_TEMPLATE, number)
        return self._chat.render(chat, number, deadline)

    def _stock_rows(
        self, items: Sequence[Plain], way: Direction | None, cut: bool | str = True, max_length: int | None = None
    ) -> list[Encoded]:
        limit = None if way is None else max_length or self.max_length
        with self._lock:
            return stock_rows(self._stock, items, limit, (way or "Right").lower(), cut)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens."""
        if self._compiled is not None:
            return [made.ids for made in self._compiled.encode_batch_fast(list(texts), add_special_tokens=False)]
        with self._lock:
            made = [self._stock(text, add_special_tokens=False, verbose=False) for text in texts]
        return [list(row["input_ids"]) for row in made]

    def _rows(
        self, items: Sequence[Plain | Tokens], way: Direction | None, deadline: float, most: int
    ) -> list[Encoded]:
        texts = [text for item in items for text in texts_of(item)] if self._templates else []
        short = iter(self._tokens([text for text in texts if len(text) <= WHOLE_CHARS]))
        left = way == "Left"

        def row(item: Plain | Tokens, number: int) -> Encoded:
            if isinstance(item, Tokens):
                return item.row(self.record.vocab_size, number, most, way)
            if not self._templates:
                return self._stock_rows([item], way, max_length=most)[0]
            texts = texts_of(item)
            template = self._template_of(texts)
            if all(len(text) <= WHOLE_CHARS for text in texts):
                parts = [next(short) for _ in texts]
                if sum(map(len, parts)) + template.added <= most:
                    return template.put(parts)
                return self._row([Reading(part, from_end=left) for part in parts], template, way, number, most)
            readings = [self._reading(text, left, deadline, short) for text in texts]
            return self._row(readings, template, way, number, most)

        return [row(item, number) for number, item in enumerate(items)]

    def _reading(self, text: str, left: bool, deadline: float, short: Iterator[list[int]] | None = None) -> Reading:
        """Of a text from its end, if ``left`` is cut. short: has the tokens of those that are tokenised whole."""
        if len(text) <= WHOLE_CHARS:
            return Reading(self._tokens([text])[0] if short is None else next(short), from_end=left)
        return Reading([], self._parts(text, left, deadline), left)

    def _parts(self, text: str, from_end: bool, deadline: float) -> Iterator[list[int]]:
        """The tokens of the parts of a long text, each made when it is asked for."""
        for part in self._joints.parts(text, PART_CHARS, LARGE_CHARS // 2, from_end):
            if time.monotonic() > deadline:
                raise DeadlineError("the request's time ran out while its text was tokenised: send less text")
            yield from self._tokens([part])

    def _row(self, texts: list[Reading], template: Template, way: Direction | None, number: int, most: int) -> Encoded:
        room = most - template.added
        if room < 1 and most < self.max_length:
            raise InputError(f"is to be cut to {most} tokens, and {template.added} are special ones: keep more", number)
        for text in texts:
            text.read(most)
        lengths = [len(text.ids) for text in texts]
        if sum(lengths) > max(0, room):
            if way is None:
                raise self._too_long(sum(lengths) + template.added, all(text.unread is None for text in texts), number)
            if len(texts) == 2 and room % 2 and min(lengths) > room // 2:
                beyond = most  # one token hangs on which is the longer one
                while all(text.unread is not None for text in texts):
                    beyond *= 2
                    for text in texts:
                        text.read(beyond)
                ended = max(len(text.ids) for text in texts if text.unread is None)
                for text in texts:
                    text.read(ended)
                lengths = [len(text.ids) for text in texts]
        counts = kept(lengths, max(0, room), self.compiled or self.facts.fast)
        return template.put([text.cut(count) for text, count in zip(texts, counts, strict=True)])

    def _too_long(
        self, tokens: int, known: bool, number: int, most: int | None = None, chunks: Chunks = WHOLE
    ) -> InputTooLongError:
        most = most or self.max_length
        said = str(tokens) if known else f"more than {most}"
        takes = "this model takes" if chunks == WHOLE else f"{chunks.max_chunks} chunks (max_chunks) hold"
        return InputTooLongError(f"has {said} tokens and {takes} {most}: shorten it, or set `truncate` to true", number)

    def _check_row(self, row: Encoded, number: int, most: int | None = None) -> None:
        """Refuse what the model cannot look up: it would fail the step, and all rows in it."""
        if not row.ids:
            raise EmptyInputError("has no tokens: send some text", number)
        if len(row) > (most or self.max_length):
            raise self._too_long(len(row), True, number, most)
        if max(row.ids) >= self.record.vocab_size or min(row.ids) < 0:
            unknown = next(i for i in row.ids if not 0 <= i < self.record.vocab_size)
            made = self._compiled.id_to_token if self._compiled is not None else self._stock.convert_ids_to_tokens
            token = made(unknown)
            raise InputError(
                f"has the token {token!r} with the id {unknown}, and the model's vocabulary ends at "
                f"{self.record.vocab_size - 1}: leave it out, or resize the model's embedding for its tokenizer",
                number,
            )
        types = self.record.token_types
        if types and max(row.types) >= types:
            raise InputError(f"has the token type {max(row.types)}, and the model has {types}", number)
