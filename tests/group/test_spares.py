"""Processes that wait for ranks, as the Ray actors that they are: whose they are they say whatever they do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.served import alive
from tpray.errors import ConfigError, GroupError
from tpray.group.spares import NAMESPACE, Spares, answer, claim
from tpray.local_ray.local import ensure_ray, stop_ray
from tpray.platforms.topology import Topology

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    assert ensure_ray(2)
    yield
    stop_ray()


def until_gone(pid: int, within_s: float = 10.0) -> None:
    give_up = time.monotonic() + within_s
    while alive(pid):
        assert time.monotonic() < give_up, "the process is still there"
        time.sleep(0.05)


def busy(spares: Spares, folder: Path) -> Path:
    """Have a spare work until the file is there whose path is returned; when it has begun."""
    begun, end = folder / "begun", folder / "end"

    def work() -> None:  # shipped by value, for a spare cannot import the tests
        begun.touch()
        while not end.exists():
            time.sleep(0.05)

    spares.ask(work)
    give_up = time.monotonic() + 30
    while not begun.exists():
        assert time.monotonic() < give_up, "the spare does not begin"
        time.sleep(0.05)
    return end


def test_a_spare_that_is_busy_says_at_once_whose_it_is(tmp_path: Path) -> None:
    """Else a second group would wait for the trace of the first one, and its start would be given up."""
    import ray

    spares = Spares(Topology(1), 1)
    pid = answer(spares.ask(os.getpid))
    end = busy(spares, tmp_path)
    (actor,) = asyncio.run(asyncio.wait_for(claim(spares.names, 1), 30))
    assert asyncio.run(asyncio.wait_for(claim(spares.names, 1), 30)) == [], "it has an owner"
    spares.end()
    assert alive(pid), "an owner's spare stays"
    end.touch()
    assert ray.get(actor.pid.remote()) == pid
    ray.kill(actor)
    until_gone(pid)


def test_nobodys_spare_ends_at_once_though_it_is_busy(tmp_path: Path) -> None:
    spares = Spares(Topology(1), 1)
    pid = answer(spares.ask(os.getpid))
    busy(spares, tmp_path)
    spares.end()
    until_gone(pid)
    assert asyncio.run(claim(spares.names, 1)) == [], "who looks for it later starts one"


def test_what_a_spare_is_asked_it_does_one_after_another(tmp_path: Path) -> None:
    spares, file = Spares(Topology(1), 1), tmp_path / "lines"

    def note(name: str) -> None:
        for word in ("begins", "ends"):
            with file.open("a") as lines:
                lines.write(f"{name} {word}\n")
            time.sleep(0.2)

    for asked in [spares.ask(note, name) for name in "abc"]:
        answer(asked)
    assert file.read_text().splitlines() == [f"{name} {word}" for name in "abc" for word in ("begins", "ends")]
    spares.end()


def test_what_a_spare_raises_is_the_askers() -> None:
    spares = Spares(Topology(1), 1)

    def refuse() -> None:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        answer(spares.ask(refuse))
    with pytest.raises(GroupError, match="has died"):
        answer(spares.ask(os._exit, 1))


def test_a_claim_that_is_cancelled_leaves_no_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that has said yes, nor one that was still asked: nobody would know of them until the replica ends."""
    import ray

    spares = Spares(Topology(2), 1)
    actors = [ray.get_actor(name, NAMESPACE) for name in spares.names]
    pids: list[int] = ray.get([actor.pid.remote() for actor in actors])

    async def run() -> None:
        found = asyncio.Event()
        own: Any = ray.get_actor

        def get(name: str, namespace: str) -> Any:
            """The second one is found late."""
            if name == spares.names[1]:
                loop.call_soon_threadsafe(found.set)
                time.sleep(1)
            return own(name, namespace)

        monkeypatch.setattr(ray, "get_actor", get)
        loop = asyncio.get_running_loop()
        claiming = asyncio.create_task(claim(spares.names, 2))
        await found.wait()
        await asyncio.sleep(0.5)  # the first one has said yes
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming

    asyncio.run(run())
    until_gone(pids[0])
    assert alive(pids[1]), "it was never asked"
    spares.end()
    until_gone(pids[1])
