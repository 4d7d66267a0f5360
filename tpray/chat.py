"""Conversations: what an item of messages is, and the text that the tokenizer's chat template makes of it.

transformers renders (`transformers.utils.chat_template_utils`, in jinja's sandbox), as `apply_chat_template` does with
``tokenize=False``, and no generation prompt unless it is asked for. The text holds its own special tokens: none are
added when it is tokenised. That module costs 0.4 s to import, and no torch; it is imported when the first conversation
comes.

A template belongs to the operator, as the checkpoint does, and the messages to a stranger. A template that raises, or
lacks what it reads, refuses one item. One that does not end is ended after `RENDER_S`, or at the deadline of the
request, at the next line of its compiled code; one whose text grows beyond `MOST_CHARS` is ended there. Not bounded is
a single operation, such as ``"x" * 10 ** 10`` or ``9 ** 9 ** 9``, which Python does not interrupt.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tpray.errors import ConfigError, DeadlineError, EmptyInputError, InputError, TprayError

FILE = "chat_template.jinja"
"""Where transformers looks for the template beside a tokenizer."""

RENDER_S = 5.0
"""How long a template may take. One of the usual kind takes some 10 µs a message."""

MOST_CHARS = 8_000_000
"""How long a conversation may become: four times the largest body that a server takes by default."""

NO_TEMPLATE = (
    "is a conversation, and this model's tokenizer has no chat template: give the server one with --chat-template FILE "
    "(chat_template in a config file), or send text"
)


@dataclass(frozen=True)
class Chat:
    """A conversation.

    messages: objects with a ``role`` and, mostly, a ``content``; which ones there may be is the template's to say.
    generation_prompt: have the template begin the next message, where it can.
    """

    messages: tuple[Mapping[str, Any], ...]
    generation_prompt: bool = False

    @classmethod
    def of(cls, messages: Any, number: int | None = None) -> Chat:
        """The conversation of item ``number``.

        Raises:
            InputError: it is not a list of messages. EmptyInputError: there is none.
        """
        if not isinstance(messages, (list, tuple)):
            raise InputError("has messages that are no list: send [{role, content}, ...]", number)
        if not messages:
            raise EmptyInputError("is a conversation without messages: send at least one", number)
        for place, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"has a message {place} without a role: send an object with role and content", number)
        return cls(tuple(messages))

    @property
    def characters(self) -> int:
        """In its strings; about as many as are rendered."""
        return sum(map(_characters, self.messages))


def _characters(value: Any) -> int:
    """In the strings of JSON, without recursion: a stranger chooses how deep it is."""
    total, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            total += len(each)
        elif isinstance(each, Mapping):
            left.extend(each.values())
        elif isinstance(each, (list, tuple)):
            left.extend(each)
    return total


class Rendered(str):
    """A text that holds its special tokens already."""

    __slots__ = ()


def read_template(path: Path) -> str:
    """The chat template in a file of the user's.

    Raises:
        ConfigError: it cannot be read, or there is nothing in it.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise ConfigError(f"the chat template {path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not text.strip():
        raise ConfigError(f"the chat template {path} is empty: write a jinja template, or leave --chat-template out")
    return text


def own_template(path: Path | None) -> Path | None:
    """The file of the user's that `read_template` can read, whatever the folder that a process is in; None: none."""
    if path is None:
        return None
    read_template(path)
    return path.expanduser().resolve()


def check_template(path: Path) -> None:
    """Refuse a template of the user's that jinja cannot compile.

    Raises:
        ConfigError: with what jinja says.
    """
    try:
        _compiled(read_template(path))
    except ConfigError:
        raise
    except Exception as e:  # jinja's errors, and Python's of the code that it makes
        raise ConfigError(f"the chat template {path} is not a jinja template: {_said(e)}") from e


def template_of(tokenizer: Any) -> str | None:
    """The template that transformers takes for ``tokenizer``, of several the default one; None: there is none."""
    try:
        found = tokenizer.get_chat_template()
    except (ValueError, AttributeError):  # it has none; or several, and none is the default
        return None
    return found if isinstance(found, str) else None


class ChatTemplate:
    """Renders conversations as transformers does. Any thread may use it.

    Args:
        text: the template.
        special: the tokenizer's special tokens by their names, which a template may use: ``bos_token`` and so on.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        self._text, self._special = text, dict(special)

    def render(self, chat: Chat, number: int | None = None, deadline: float = math.inf) -> Rendered:
        """The text of item ``number``.

        Args:
            deadline: of its request, `time.monotonic` seconds.

        Raises:
            InputError: the template refuses it, or takes too long, or makes too much of it.
            DeadlineError: ``deadline`` passed.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        # As `apply_chat_template`: some clients send null for what is not there, and templates ask whether it is.
        messages = [{name: value for name, value in each.items() if value is not None} for each in chat.messages]
        try:
            _compiled(self._text).environment.concat = _join_bounded
            with _Ending(min(deadline, time.monotonic() + RENDER_S)):
                ((text,), _) = render_jinja_template(
                    conversations=[messages],
                    chat_template=self._text,
                    add_generation_prompt=chat.generation_prompt,
                    **self._special,
                )
        except _OutOfTimeError as e:
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    "the request's time ran out while the chat template made a text of it: send fewer messages"
                ) from e
            raise InputError(
                f"takes the model's chat template more than {RENDER_S:g} s: send fewer messages, or mend the template",
                number,
            ) from e
        except _TooMuchError as e:
            raise InputError(
                f"becomes more than {MOST_CHARS} characters in the model's chat template: send fewer messages, or mend "
                "the template",
                number,
            ) from e
        except Exception as e:  # jinja's errors, and whatever Python raises for what the template does
            raise InputError(f"is refused by the model's chat template: {_said(e)}", number) from e
        return Rendered(text)


def _compiled(text: str) -> Any:
    """transformers' template, of which it keeps the latest."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(text)


def _said(error: Exception) -> str:
    """A template's own words where they are its own, in one line."""
    import jinja2

    said = " ".join(str(error).split()) or type(error).__name__
    return said if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"


class _OutOfTimeError(TprayError):
    """A template has run for too long."""


class _TooMuchError(TprayError):
    """A template has made too long a text."""


def _join_bounded(parts: Iterable[str]) -> str:
    """What jinja does with the parts of a text, as far as `MOST_CHARS`."""
    kept, length = [], 0
    for part in parts:
        length += len(part)
        if length > MOST_CHARS:
            raise _TooMuchError
        kept.append(part)
    return "".join(kept)


_COMPILED = "<template>"
"""The file that jinja says its compiled code is in."""


class _Ending:
    """Raises `_OutOfTimeError` in this thread's Python code that runs within the block at ``until``.

    By `sys.settrace`, which calls us at each call, and at each line of the template, in this thread alone.
    """

    def __init__(self, until: float) -> None:
        self._until = until

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > self._until:
            raise _OutOfTimeError
        return self._trace if frame.f_code.co_filename == _COMPILED else None

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
