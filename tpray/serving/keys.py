"""Who may ask: bearer keys with names and limits, from a file that may change while the server runs.

The file has a line for each key; blank lines and those that begin with # are skipped::

    alice: 5f0e6c1b9a...  requests=600/min tokens=100000/min
    batch-jobs: sha256:9f86d081884c7d65...

The name says in logs and metrics who asks. ``sha256:`` and 64 hexadecimal digits are a key that the file does not give
away. A limit is a bucket (https://en.wikipedia.org/wiki/Token_bucket) that holds what a minute allows and fills evenly.
A request takes its tokens when they are known, however few are left: later ones wait until the bucket has filled again.
Limits are of each replica.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from tpray.config import AccessConfig, api_key
from tpray.errors import ConfigError, RateLimitError, UnauthorizedError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How long a changed file may go unseen."""
LEAST_CHARACTERS = 8
"""Of a key that is not given as its digest: fewer are guessed."""
DEFAULT = "default"
"""The name of the key that has none of its own."""
OWN = "@server"
"""The name of the key with which a server asks itself: no line gives one that begins so."""

_LINE = re.compile(r"([\w.-][\w.@-]{0,63})\s*:\s*(\S+)((?:\s+\S+)*)", re.ASCII)
_LIMIT = re.compile(r"(requests|tokens)=([1-9]\d{0,11})/min", re.ASCII)
_FORM = (
    "write `name: key`, the name of letters, digits and ._@-, and then perhaps requests=600/min and tokens=100000/min"
)


@dataclass(frozen=True)
class Key:
    """A key as the file gives it. digest: its SHA-256. requests, tokens: what it may use in a minute; None: any."""

    name: str
    digest: bytes
    requests: int | None = None
    tokens: int | None = None


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def hidden(name: str, key: str) -> str:
    """A line for a key that does not give it away.

    Raises:
        ConfigError: it is too short, or cannot be sent in a header.
    """
    _check(name, key)
    return f"{name}: sha256:{digest_of(key).hex()}"


def _check(name: str, key: str) -> None:
    if len(key) < LEAST_CHARACTERS or not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"the key {name!r} is not one: take {LEAST_CHARACTERS} or more printable characters without spaces, such "
            "as `openssl rand -hex 32` gives"
        )


def parse(lines: Iterable[str], where: str) -> tuple[Key, ...]:
    """The keys that lines give. where: what has them, for a message.

    Raises:
        ConfigError: a line is not one, or a name or key comes twice.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        limits = [] if found is None else [_LIMIT.fullmatch(word) for word in found[3].split()]
        given = {limit[1]: int(limit[2]) for limit in limits if limit is not None}
        if found is None or len(given) != len(limits):
            raise ConfigError(f"{where}, line {number} gives no key: {_FORM}")  # the line itself may be one
        name, secret = found[1], found[2]
        try:
            key = Key(name, _digest(name, secret), **given)
        except ConfigError as e:
            raise ConfigError(f"{where}, line {number}: {e}") from None
        if name in keys:
            raise ConfigError(f"{where}, line {number}: there is another key {name!r}: give each a name of its own")
        if key.digest in {other.digest for other in keys.values()}:
            raise ConfigError(f"{where}, line {number}: {name!r} has the key of another line: give each its own")
        keys[name] = key
    return tuple(keys.values())


def _digest(name: str, secret: str) -> bytes:
    if not secret.startswith("sha256:"):
        _check(name, secret)
        return digest_of(secret)
    if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", secret):
        raise ConfigError(f"the digest of {name!r} is none: after sha256: come 64 digits, as `sha256sum` prints them")
    return bytes.fromhex(secret.removeprefix("sha256:"))


class Bucket:
    """What may be used in a minute, and how much of it is left now."""

    def __init__(self, a_minute: int, clock: Callable[[], float]) -> None:
        self._most, self._clock = a_minute, clock
        self._left, self._at = float(a_minute), clock()

    def wait_s(self, amount: float) -> float:
        """In how many seconds ``amount`` is there; 0: it is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now
        return max(0.0, (amount - self._left) * 60 / self._most)

    def take(self, amount: int) -> None:
        """Use so much, which may be more than there is."""
        self._left -= amount


@dataclass
class Usage:
    """What a key was used for since the start: requests let in, requests refused for its limits, and tokens."""

    requests: int = 0
    refused: int = 0
    tokens: int = 0


class Caller:
    """A key in use."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.key, self.name, self.usage = key, key.name, Usage()
        self._requests = None if key.requests is None else Bucket(key.requests, clock)
        self._tokens = None if key.tokens is None else Bucket(key.tokens, clock)

    def admit(self) -> None:
        """Let a request in, whose tokens are charged later.

        Raises:
            RateLimitError: a limit is used up.
        """
        for bucket, amount, limit in (
            (self._requests, 1.0, f"{self.key.requests} requests"),
            (self._tokens, 1.0, f"{self.key.tokens} tokens"),
        ):
            wait_s = 0.0 if bucket is None else bucket.wait_s(amount)
            if wait_s > 0:
                self.usage.refused += 1
                seconds = math.ceil(wait_s)
                raise RateLimitError(
                    f"the key {self.name!r} has used its {limit} a minute: try again in {seconds} s", seconds
                )
        if self._requests is not None:
            self._requests.take(1)
        self.usage.requests += 1

    def charge(self, tokens: int) -> None:
        """Take a request's tokens."""
        self.usage.tokens += tokens
        if self._tokens is not None:
            self._tokens.take(tokens)


ASKING: ContextVar[Caller | None] = ContextVar("tpray_asking", default=None)
"""Whose request is being answered, where keys are asked for."""


def charge(tokens: int) -> bool:
    """Have the key of the request that is being answered pay for its tokens; False: it has none."""
    caller = ASKING.get()
    if caller is None:
        return False
    caller.charge(tokens)
    return True


class KeyRing:
    """The keys that a server takes: some that never change, and those of a file, which is read again when it changes.

    Args:
        given: those that never change. file: None: there are no others.
    """

    def __init__(
        self, given: Iterable[Key] = (), file: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._given, self._file, self._clock = tuple(given), file, clock
        self._callers: tuple[Caller, ...] = ()
        self._seen: object = None
        self._looked = clock()
        if file is not None:
            self._seen = _stamp(file)
        self._use(_read(self._given, file))

    @classmethod
    def of(cls, config: AccessConfig, own_digest: str | None = None) -> KeyRing:
        """Those that a configuration names, and ``TPRAY_API_KEY``.

        Args:
            own_digest: of the server's own key, which is taken where there are others.

        Raises:
            ConfigError: the file cannot be read or has no key, or a key is not one.
        """
        given, from_environment = parse(config.keys, "access.keys"), api_key()
        if from_environment is not None:
            (key,) = parse([hidden(DEFAULT, from_environment)], "TPRAY_API_KEY")
            if key.digest not in {other.digest for other in given}:
                given += (key,)
        file = None if config.keys_file is None else config.keys_file.expanduser()
        if own_digest is not None and (given or file is not None):
            given += (Key(OWN, bytes.fromhex(own_digest)),)
        return cls(given, file)

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._callers)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the keys, without the server's own."""
        return tuple(caller.name for caller in self._callers if caller.name != OWN)

    def usage(self) -> dict[str, Usage]:
        """What each key was used for, by its name."""
        return {caller.name: caller.usage for caller in self._callers}

    def find(self, authorization: bytes | None) -> Caller:
        """Whose key an ``Authorization`` header shows; it is compared with all, in the same time for each.

        Raises:
            UnauthorizedError: it shows none, or one that is not known.
        """
        self.look()
        scheme, _, shown = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not shown.strip():
            raise UnauthorizedError("this server asks for a key: send the header Authorization: Bearer KEY")
        digest, found = hashlib.sha256(shown.strip()).digest(), None
        for caller in self._callers:
            if hmac.compare_digest(digest, caller.key.digest):
                found = caller
        if found is None:
            raise UnauthorizedError("this key is not known here: ask whoever runs the server for one")
        return found

    def look(self) -> None:
        """Read the file again if it has changed; one that is broken changes nothing. The log says what came of it."""
        now = self._clock()
        if self._file is None or now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        stamp = _stamp(self._file)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._use(_read(self._given, self._file))
        except ConfigError as e:
            log.error("the keys stay as they were: %s", e)
        else:
            log.warning("%s has changed: its keys are %s", self._file, ", ".join(self.names))

    def _use(self, keys: tuple[Key, ...]) -> None:
        """Take these from now on; what a key has used stays used, unless its limits are others."""
        before = {caller.name: caller for caller in self._callers}
        after = []
        for key in keys:
            caller, old = Caller(key, self._clock), before.get(key.name)
            if old is not None:
                caller.usage = old.usage
                if (old.key.requests, old.key.tokens) == (key.requests, key.tokens):
                    caller._requests, caller._tokens = old._requests, old._tokens
            after.append(caller)
        self._callers = tuple(after)


def _stamp(file: Path) -> object:
    """What changes when a file does."""
    try:
        found = file.stat()
    except OSError as e:
        return e.errno
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(given: tuple[Key, ...], file: Path | None) -> tuple[Key, ...]:
    if file is None:
        return given
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"the file of keys {file} cannot be read ({reason}): every machine that answers requests needs it"
        ) from e
    keys = parse(text.splitlines(), str(file))
    if not keys:
        raise ConfigError(f"the file of keys {file} has none: {_FORM}")
    for key in keys:
        if any(key.name == other.name for other in given):
            raise ConfigError(
                f"{file}: {key.name!r} is the name of the key of --api-key or TPRAY_API_KEY: take another"
            )
    return given + keys
