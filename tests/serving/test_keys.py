"""Keys and their limits: what a file of them may hold, and what becomes of one that changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

import pytest

from tpray.config import AccessConfig
from tpray.errors import ConfigError, RateLimitError, UnauthorizedError
from tpray.serving.keys import LOOK_EVERY_S, Caller, Key, KeyRing, digest_of, hidden, parse

ALICE, BOB = "alice-0123456789", "bob-0123456789"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def test_a_line_gives_a_name_a_key_and_limits() -> None:
    hashed = hashlib.sha256(BOB.encode()).hexdigest()
    lines = [
        "# who may ask",
        "",
        f"alice: {ALICE} requests=600/min  tokens=1000/min",
        f"  bob@example.com:sha256:{hashed} ",
    ]
    assert parse(lines, "file") == (
        Key("alice", digest_of(ALICE), 600, 1000),
        Key("bob@example.com", digest_of(BOB)),
    )
    assert parse([hidden("bob", BOB)], "flag") == (Key("bob", digest_of(BOB)),)


def test_the_readmes_line_is_a_key_with_limits() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    line = readme.partition('echo "alice: ')[2].partition('"')[0].replace("$(openssl rand -hex 32)", "0f" * 32)
    (key,) = parse([f"alice: {line}"], "README")
    assert (key.name, key.requests, key.tokens) == ("alice", 600, 100_000)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["alice"], "line 1 gives no key: write `name: key`"),
        ([f"al ice: {ALICE}"], "line 1 gives no key"),
        ([f"a: {ALICE} request=6/min"], "line 1 gives no key"),
        ([f"a: {ALICE} requests=6/s"], "line 1 gives no key"),
        ([f"a: {ALICE} requests=0/min"], "line 1 gives no key"),
        ([f"a: {ALICE} requests=6/min requests=7/min"], "line 1 gives no key"),
        (["", "a: short"], "line 2: the key 'a' is not one: take 8 or more printable characters"),
        (["a: sha256:12"], "line 1: the digest of 'a' is none"),
        (["a: kéy-0123456789"], "line 1: the key 'a' is not one"),
        ([f"a: {ALICE}", f"a: {BOB}"], "line 2: there is another key 'a'"),
        ([f"a: {ALICE}", f"b: {ALICE}"], "line 2: 'b' has the key of another line"),
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_showing_it(lines: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(lines, "keys.txt")
    assert f"keys.txt, {words}" in str(refused.value)
    assert ALICE not in str(refused.value)
    assert "short" not in str(refused.value)


def test_only_a_known_key_as_a_bearer_is_let_in() -> None:
    ring = KeyRing(parse([f"alice: {ALICE}", f"bob: {BOB}"], "x"))
    assert ring.names == ("alice", "bob")
    assert ring.find(bearer(BOB)).name == "bob"
    assert ring.find(f"bEARER   {ALICE} ".encode()).name == "alice"
    for shown in (None, b"", b"Bearer", b"Bearer ", ALICE.encode(), f"Basic {ALICE}".encode(), bearer(ALICE[:-1]),
                  bearer(ALICE + "x"), bearer(digest_of(ALICE).hex()), bearer(f"sha256:{digest_of(ALICE).hex()}"),
                  b"Bearer \xff\xfe", bearer(f"{ALICE} {BOB}")):  # fmt: skip
        with pytest.raises(UnauthorizedError) as refused:
            ring.find(shown)
        assert ALICE not in str(refused.value)


def test_a_file_that_changes_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(f"alice: {ALICE} requests=1/min\n")
    ring = KeyRing((), file, clock)
    ring.find(bearer(ALICE)).admit()
    used = ring.usage()["alice"]

    def becomes(text: str | None) -> None:
        new = tmp_path / "new"
        if text is None:
            file.unlink()
        else:
            new.write_text(text)
            os.replace(new, file)
        clock.now += LOOK_EVERY_S

    becomes(f"alice: {ALICE} requests=1/min\nbob: {BOB}\n")
    assert ring.find(bearer(BOB)).name == "bob"
    assert ring.usage()["alice"] is used
    with pytest.raises(RateLimitError):
        ring.find(bearer(ALICE)).admit()  # what it has used stays used
    for broken in ("alice\n", "", "# nobody\n", "alice: \xff", None):
        caplog.clear()
        becomes(broken)
        with caplog.at_level(logging.ERROR):
            assert ring.find(bearer(ALICE)).name == "alice"
            clock.now += LOOK_EVERY_S
            assert ring.find(bearer(BOB)).name == "bob"
        (record,) = caplog.records
        assert record.getMessage().startswith("the keys stay as they were: ")
        assert str(file) in record.getMessage()
    becomes(f"bob: {BOB}\n")
    assert ring.find(bearer(BOB)).name == "bob"
    with pytest.raises(UnauthorizedError):
        ring.find(bearer(ALICE))


def test_a_file_that_is_not_there_or_empty_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every machine that answers requests needs it"):
        KeyRing.of(AccessConfig(keys_file=tmp_path / "absent"))
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="has none: write `name: key`"):
        KeyRing.of(AccessConfig(keys_file=tmp_path / "empty"))


def test_the_key_of_the_environment_is_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not KeyRing.of(AccessConfig())
    monkeypatch.setenv("TPRAY_API_KEY", ALICE)
    assert KeyRing.of(AccessConfig()).find(bearer(ALICE)).name == "default"
    assert KeyRing.of(AccessConfig(keys=(hidden("default", ALICE),))).names == ("default",)
    file = tmp_path / "keys"
    file.write_text(f"bob: {BOB}\n")
    assert KeyRing.of(AccessConfig(keys_file=file)).names == ("default", "bob")
    file.write_text(f"default: {BOB}\n")
    with pytest.raises(ConfigError, match="'default' is the name of the key of --api-key or TPRAY_API_KEY"):
        KeyRing.of(AccessConfig(keys_file=file))
    monkeypatch.setenv("TPRAY_API_KEY", "short")
    with pytest.raises(ConfigError, match="the key 'default' is not one"):
        KeyRing.of(AccessConfig())


def test_requests_beyond_a_minutes_are_refused_until_there_is_room() -> None:
    clock = Clock()
    caller = Caller(Key("a", b"", requests=6), clock)
    for _ in range(6):
        caller.admit()
    with pytest.raises(RateLimitError, match="the key 'a' has used its 6 requests a minute: try again in 10 s") as full:
        caller.admit()
    assert full.value.retry_after_s == 10
    clock.now += full.value.retry_after_s
    caller.admit()
    with pytest.raises(RateLimitError):
        caller.admit()
    clock.now += 3600
    for _ in range(6):
        caller.admit()  # and no more, however long nobody asked
    with pytest.raises(RateLimitError):
        caller.admit()
    assert (caller.usage.requests, caller.usage.refused) == (13, 3)


def test_tokens_that_were_too_many_are_paid_for_by_later_requests() -> None:
    clock = Clock()
    caller = Caller(Key("a", b"", requests=100, tokens=60), clock)
    caller.admit()
    caller.charge(180)  # known only when it was let in
    with pytest.raises(RateLimitError, match="its 60 tokens a minute") as debt:
        caller.admit()
    assert debt.value.retry_after_s == 121
    clock.now += 120
    with pytest.raises(RateLimitError):
        caller.admit()
    clock.now += 1
    caller.admit()
    assert caller.usage.tokens == 180


def test_all_keys_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is shown, the same work is done."""
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr("tpray.serving.keys.hmac.compare_digest", compare)
    ring = KeyRing(parse([f"k{i}: key-number-{i}" for i in range(9)], "x"))
    for i in (0, 4, 8):
        compared.clear()
        ring.find(bearer(f"key-number-{i}"))
        assert len(compared) == 9
