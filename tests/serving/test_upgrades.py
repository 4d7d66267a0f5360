"""Changed files under load: what is replaced, what goes on, and what a new version that does not come leaves behind."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.clients import Clients
from tests.serving.deployed import Deployed, deployed
from tpray.platforms.lease import SERVER_PORTS, take_ports
from tpray.serving import haproxy
from tpray.serving.entrance import errors

BATCH = {"inputs": [["a b"], ["a"], ["b c"], ["c a b"]]}
LABELS = (3, 4, 5)
"""Each version has another number of labels, and so is known by its answers."""


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Deployed]:
    """A Ray of three CPUs, with HAProxy: two groups of one rank fit, or one of two beside one of one."""
    folder, ports = tmp_path_factory.mktemp("upgrades"), take_ports(haproxy.PORTS, SERVER_PORTS)
    soon = {"RAY_SERVE_SLOW_STARTUP_WARNING_S": "2", "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "1"}
    with tempfile.TemporaryDirectory() as short:  # than pytest's, for sockets
        environ = haproxy.places(Path(short), ports.ids, "token", errors(60)) | haproxy.settings(60)
        with deployed(folder, free_port, 3, **soon, **environ) as ray:
            yield ray
    ports.release()


def model(source: Path | str, tp: int = 1, **changes: Any) -> dict[str, Any]:
    """A ServeConfig."""
    parallel = {"tp": tp, "cores_per_rank": 1}
    return {"model": {"source": str(source), "dtype": "float32"}, "parallel": parallel, **changes}


def config(args: dict[str, Any], import_path: str = "tpray.serving.app:build", **user: Any) -> dict[str, Any]:
    """A config file of one application."""
    app = {"name": "tpray", "route_prefix": "/", "import_path": import_path, "args": args}
    if user:
        app["deployments"] = [{"name": "Classifier", "user_config": user}]
    return {"http_options": {"host": "127.0.0.1"}, "applications": [app]}


class Watchers(Clients):
    """Clients that note by which version each request was answered; one answered by two is wrong."""

    def __init__(self, url: str, path: str = "/predict", count: int = 4) -> None:
        self.seen: list[tuple[float, int]] = []
        super().__init__(f"{url}", BATCH, self._is_of_one_version, count)

    def _is_of_one_version(self, answer: Any) -> bool:
        found = {len(row) for row in answer}
        self.seen.append((time.monotonic(), min(found)))
        return len(answer) == len(BATCH["inputs"]) and len(found) == 1 and found <= set(LABELS)

    def span(self, labels: int) -> tuple[float, float]:
        """When the version with so many labels first answered, and when last."""
        times = [when for when, found in self.seen if found == labels]
        return min(times), max(times)


def info(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/info", timeout=60).json()
    return found


def pids(url: str) -> list[int]:
    return [rank["pid"] for rank in info(url)["ranks"]]


def wait_for_labels(url: str, labels: int, limit_s: float = 60.0) -> None:
    give_up = time.monotonic() + limit_s
    while len(info(url)["labels"]) != labels:
        assert time.monotonic() < give_up, f"no version with {labels} labels answers"
        time.sleep(0.2)


def settle(deploy: Deployed, running: int) -> None:
    """Until so many replicas are there and no other."""
    give_up = time.monotonic() + 90
    while True:
        states = [
            replica["state"]
            for app in deploy.applications().values()
            for deployment in app["deployments"].values()
            for replica in deployment["replicas"]
        ]
        if states == ["RUNNING"] * running:
            return
        assert time.monotonic() < give_up, states
        time.sleep(0.2)


@pytest.fixture(scope="module")
def versions(make_checkpoint: Callable[..., Path]) -> dict[int, Path]:
    """Checkpoints, by their number of labels."""
    return {labels: make_checkpoint(num_labels=labels) for labels in LABELS}


@pytest.mark.slow
@pytest.mark.ray
def test_experiment(deploy: Deployed, versions: dict[int, Path], tmp_path: Path) -> None:
    t0 = time.monotonic()

    def say(*x):
        print(f"{time.monotonic() - t0:6.1f}", *x, flush=True)

    url = deploy(config(model(versions[3], release="one")))
    say("up")
    w = Watchers(url)
    w.wait_for_answers()
    deploy(config(model(versions[4], release="two")))
    say("deployed 4")
    wait_for_labels(url, 4)
    settle(deploy, 1)
    say("settled")
    w.wait_for_answers()
    a, b = w.span(3), w.span(4)
    say("side by side", a[1] - b[0], info(url)["release"])
    say(w.tally)
    was = pids(url)
    deploy(config(model(versions[4], release="two"), max_client_batch_size=20))
    assert pids(url) == was
    deploy(config(model(versions[4], release="two", replicas=2), max_client_batch_size=20))
    settle(deploy, 2)
    found = {tuple(pids(url)) for _ in range(20)}
    say("two replicas", found, was)
    deploy(config(model(versions[4], release="two"), max_client_batch_size=20))
    settle(deploy, 1)
    say("one again", pids(url))
    say(w.tally)
    # broken
    since = deploy.send(config(model(tmp_path / "nothing")))
    deploy.wait_for("DEPLOY_FAILED", ["tpray"], since)
    say("broken", deploy.said()[-1500:])
    say(w.tally)
    was = pids(url)
    deploy(config(model(versions[4], release="two")))
    say("rolled back", pids(url) == was)
    # no room
    deploy(config(model(versions[3], tp=2)))
    wait_for_labels(url, 3)
    settle(deploy, 1)
    say("tp 2", w.tally)
    was = pids(url)
    deploy.send(config(model(versions[5], tp=2)))
    time.sleep(8)
    say("no room", {a["name"]: a["status"] for a in deploy.applications().values()}, deploy.said())
    say(w.tally)
    deploy(config(model(versions[3], tp=2)))
    say("rolled back", pids(url) == was, w.tally)
    deploy(config(model(versions[5], tp=2, upgrade="stop-first")))
    wait_for_labels(url, 5)
    settle(deploy, 1)
    say("stop-first")
    tally = w.stop()
    say(tally)
    a, b = w.span(3), w.span(5)
    say("gap", b[0] - a[1])
