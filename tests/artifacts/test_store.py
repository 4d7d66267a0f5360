"""Artifacts at a URL: copied once, whole or not at all; and the store that machines share, on a disk and on S3."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from tpray import load
from tpray.artifacts import store as stores
from tpray.artifacts.store import SharedStore
from tpray.commands.cli import USER_ERRORS
from tpray.errors import ConfigError, ModelNotFoundError, StoreError
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.local import LocalClassifier


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a stand-in for S3 that speaks its HTTP on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket/models"
    import boto3

    own = {"AWS_ENDPOINT_URL": request.getfixturevalue("s3"), "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (own | dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")).items():
        monkeypatch.setenv(name, value)
    bucket = f"models-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/models"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes this process one of several machines, each with a cache of its own."""
    return lambda name: monkeypatch.setenv("TPRAY_CACHE", str(tmp_path / "machines" / name))


def start(model: str | Path, store: str | None = None) -> LocalClassifier:
    return load(model, tp=2, dtype="float32", executor=ThreadExecutor(2), store=store)


def damage(artifact: Path) -> None:
    weights = artifact / "rank_01" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def test_one_machine_traces_and_others_start_from_the_store(
    store: str, machine: Callable[[str], None], make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint()
    machine("first")
    with start(checkpoint, store) as classifier:
        wanted = classifier.classify("a b c")
        assert classifier.group.traced
        url = str(classifier.group.url)
    assert url.startswith(f"{store}/")
    machine("second")
    with start(checkpoint, store) as classifier:
        assert not classifier.group.traced
        assert classifier.classify("a b c") == wanted
    machine("third")  # knows no checkpoint
    with start(url) as classifier:
        assert not classifier.group.traced
        assert classifier.classify("a b c") == wanted


def test_what_was_traced_before_is_put_into_the_store(
    tmp_path: Path, machine: Callable[[str], None], make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Others take it from there; one whose copy breaks off traces, and serves all the same."""
    store = f"file://{tmp_path}/store"
    machine("first")
    with start(make_checkpoint()):
        pass
    with start(make_checkpoint(), store) as classifier:
        assert not classifier.group.traced
    machine("second")
    with start(make_checkpoint(), store) as classifier:
        assert not classifier.group.traced
    machine("third")
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "get_file", broken)
        with start(make_checkpoint(), store) as classifier:
            assert classifier.group.traced
            assert len(classifier.classify("a b c")) == 3


def broken(*_: object) -> None:
    raise ConnectionError("gone")


def test_a_damaged_artifact_is_traced_again_and_mended_in_the_store(
    tmp_path: Path, machine: Callable[[str], None], make_checkpoint: Callable[..., Path]
) -> None:
    store = f"file://{tmp_path}/store"
    machine("first")
    with start(make_checkpoint(), store) as classifier:
        url = str(classifier.group.url)
    damage(Path(url.removeprefix("file://")))
    machine("second")
    with start(make_checkpoint(), store) as classifier:
        assert classifier.group.traced
    machine("third")
    with start(make_checkpoint(), store) as classifier:
        assert not classifier.group.traced


def test_one_traces_while_another_waits(
    store: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "POLL_S", 0.01)
    events = []

    async def trace(shared: SharedStore, name: str) -> None:
        async with shared.claim("key"):
            events.append(f"{name} has it")
            await asyncio.sleep(0.2)
            events.append(f"{name} is done")

    async def both() -> None:
        await asyncio.gather(trace(SharedStore(store), "a"), trace(SharedStore(store), "b"))

    asyncio.run(both())
    first, second = ("a", "b") if events[0].startswith("a") else ("b", "a")
    assert events == [f"{first} has it", f"{first} is done", f"{second} has it", f"{second} is done"]


def test_a_crashed_holders_lock_is_taken_over_and_a_working_ones_is_not(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder notices, should it not have crashed after all, and publishes nothing."""
    monkeypatch.setattr(stores, "POLL_S", 0.02)
    monkeypatch.setattr(stores, "RENEW_S", 0.05)
    monkeypatch.setattr(stores, "STALE_S", 1.5)

    async def take(key: str) -> None:
        async with SharedStore(store).claim(key):
            pass

    async def crash() -> None:
        shared = SharedStore(store)
        async with shared.claim("key") as claim:
            with pytest.raises(asyncio.TimeoutError):  # it is renewed
                await asyncio.wait_for(take("key"), 2.5)
            assert not claim.lost
            shared._create(f"{shared._path}/other.lock", "somebody who crashed")
            await asyncio.wait_for(take("other"), 20)  # nobody renewed that one
            give_up = time.monotonic() + 20
            while not claim.lost:  # its next renewal may come in between, and would undo it
                assert time.monotonic() < give_up
                shared._files.pipe_file(f"{shared._path}/key.lock", b'{"owner": "another", "beats": 0}')
                await asyncio.sleep(0.2)
        assert shared._read(f"{shared._path}/key.lock"), "another's lock is not removed"

    asyncio.run(crash())


def test_copied_once_and_again_when_it_has_changed(
    tmp_path: Path, machine: Callable[[str], None], make_checkpoint: Callable[..., Path]
) -> None:
    machine("first")
    with start(make_checkpoint(), f"file://{tmp_path}/store") as classifier:
        url = str(classifier.group.url)
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(stores.fetch, [url] * 4))
    assert len(copies) == 1
    there = Path(url.removeprefix("file://"))
    (there / "manifest.json").open("a").write("\n")  # another upload, of another digest
    shutil.rmtree(there / "rank_01")
    assert not (stores.fetch(url) / "rank_01").exists()


def test_what_is_not_there_is_named(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no artifact at file:///"):
        stores.fetch(f"file://{tmp_path}/absent")
    with pytest.raises(ConfigError, match="nosuch"):
        stores.fetch("nosuch://bucket/model")
    with pytest.raises(ConfigError, match="is not the URL of a store"):
        start(make_checkpoint(), "models")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"the store file://.* cannot be used"):
        SharedStore(f"file://{tmp_path}/file").publish(tmp_path, "key")


def test_a_store_that_cannot_be_used_is_no_reason_not_to_serve(
    tmp_path: Path, make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with start(make_checkpoint(), f"file://{tmp_path}/file") as classifier:
        assert len(classifier.classify("a b c")) == 3
        assert classifier.group.url is None
        artifact = classifier.group.artifact
    assert "cannot be used" in caplog.text
    assert artifact is not None
    with pytest.raises(ConfigError, match="traced already: a store is for"):
        start(artifact.directory, f"file://{tmp_path}/store")


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    (folder / "rank_00").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "rank_00" / "x").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "get_file", broken)
        with pytest.raises(StoreError, match="gone"):
            stores.fetch(f"file://{folder}")
    assert stores.fetch(f"file://{folder}").joinpath("rank_00", "x").read_text() == "x"


def test_an_outage_is_not_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 and not 2, which says that something given cannot work."""
    monkeypatch.setattr(LocalFileSystem, "cat_file", broken)
    with pytest.raises(StoreError, match="cannot be used: ConnectionError: gone") as caught:
        stores.fetch(f"file://{tmp_path}/model")
    assert not isinstance(caught.value, USER_ERRORS)
