"""Changed files under load: what is replaced, what goes on, and what a new version that does not come leaves behind."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.clients import Clients
from tests.serving.deployed import Deployed, deployed
from tests.serving.test_cluster_files import FLAGS
from tpray.config import ModelsConfig, ServeConfig
from tpray.platforms.lease import SERVER_PORTS, take_ports
from tpray.platforms.topology import Topology
from tpray.ray_private import keep_version
from tpray.serving import haproxy, models, upgrades

BATCH = {"inputs": [["a b"], ["a"], ["b c"], ["c a b"]]}
LABELS = (3, 4, 5)
"""Each version has another number of labels, and so is known by its answers."""


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Deployed]:
    """A Ray of three CPUs, with HAProxy and what cluster.yaml sets; a group of two ranks leaves no room for another."""
    folder, ports = tmp_path_factory.mktemp("upgrades"), take_ports(haproxy.PORTS, SERVER_PORTS)
    soon = {"RAY_SERVE_SLOW_STARTUP_WARNING_S": "2", "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "1"}
    with tempfile.TemporaryDirectory() as short:  # than pytest's, for sockets
        environ = haproxy.places(Path(short), ports.ids, "token", {})
        del environ["RAY_SERVE_HAPROXY_BINARY_PATH"]  # HAProxy as Serve configures it, and not as `tpray serve` does
        for name in ("STATS", "METRICS"):
            environ[f"RAY_SERVE_HAPROXY_{name}_PORT"] = str(free_port())
        with deployed(folder, free_port, 3, **soon, **environ, **FLAGS) as ray:
            yield ray
    ports.release()


def model(source: Path | str, tp: int = 1, **changes: Any) -> dict[str, Any]:
    """A ServeConfig."""
    parallel = {"tp": tp, "cores_per_rank": 1}
    return {"model": {"source": str(source), "dtype": "float32"}, "parallel": parallel, **changes}


def config(args: dict[str, Any], import_path: str = "tpray.serving.app:build", **user: Any) -> dict[str, Any]:
    """A config file of one application."""
    app: dict[str, Any] = {"name": "tpray", "route_prefix": "/", "import_path": import_path, "args": args}
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


def answering(url: str) -> str:
    """``url``, once it answers: HAProxy learns of the first group a moment after Serve has it running."""
    wait_for(lambda: httpx.post(f"{url}/predict", json=BATCH, timeout=60).status_code == 200, f"{url} answers")
    return url


def pids(url: str) -> list[int]:
    return [rank["pid"] for rank in info(url)["ranks"]]


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 90.0) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up, f"not in time: {what}"
        time.sleep(0.2)


def wait_for_labels(url: str, labels: int) -> None:
    wait_for(lambda: len(info(url).get("labels", ())) == labels, f"a version with {labels} labels answers")


class Health:
    """Asks for the health of the whole, ten times a second."""

    def __init__(self, url: str) -> None:
        self._url, self._over, self._seen = url, threading.Event(), set[int]()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._over.wait(0.1):
            self._seen.add(httpx.get(f"{self._url}/health", timeout=60).status_code)

    def stop(self) -> set[int]:
        """Which statuses there were."""
        self._over.set()
        self._thread.join(70)
        return self._seen


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


def version(source: Path, **changes: Any) -> str:
    return upgrades.version_of(ServeConfig.model_validate(model(source, **changes)))


def test_a_version_is_what_a_replica_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = version(tmp_path)
    for change in ({"replicas": 3}, {"autoscaling": {"max_replicas": 2}}, {"upgrade": "stop-first"}):
        assert version(tmp_path, **change) == before, change
    for change in ({"release": "2"}, {"batch": {"max_batch_tokens": 99}}, {"tp": 2}):
        assert version(tmp_path, **change) != before, change
    (tmp_path / "config.json").write_text("{} ")
    assert version(tmp_path) != before, "the same folder with other files"


def test_a_version_has_the_template_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ServeConfig.model_validate({"model": {"source": "org/model", "chat_template": "~/chat.jinja"}})
    found = set[str]()
    for text in ("{{ messages }}", "{{ messages }}!"):
        (tmp_path / "chat.jinja").write_text(text)
        found.add(upgrades.version_of(config))
    assert len(found) == 2


@pytest.mark.parametrize("changes", [{"telemetry": {"log_requests": True}}, {"default": "a"}])
def test_what_is_in_front_of_several_models_has_its_own_version(
    changes: dict[str, Any], versions: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def note(deployment: object, version: str) -> object:
        found.append(version)
        return deployment

    monkeypatch.setattr(models, "replaceable", note)
    args = {"models": {"a": model(versions[3], replicas=1)}}
    for each in (args, args, args | changes):
        models.build(ModelsConfig.model_validate(each))
    assert found[0] == found[1] != found[2]


def test_serve_takes_a_version_that_is_kept() -> None:
    """Through what Serve does to the configuration of a deployment, in the process that builds and in its own."""
    from ray import serve
    from ray.serve._private.config import DeploymentConfig

    whole: Any = serve.deployment(type("Whole", (), {}))
    deployment = whole.options(name="x")
    keep_version(deployment, "mine")
    changed = deployment.options(ray_actor_options={"num_cpus": 0})
    config = changed._deployment_config
    config.version = "Serve's"
    arrived = DeploymentConfig.from_proto_bytes(config.to_proto_bytes())
    assert (arrived.version, type(arrived)) == ("mine", DeploymentConfig)
    assert whole._deployment_config.version is None, "others keep theirs"


@pytest.mark.parametrize(
    ("upgrade", "said"),
    [("side-by-side", "a new version waits for that, and the old one goes on"), ("stop-first", "that stops first")],
)
def test_what_comes_is_said_where_no_group_fits(
    upgrade: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServeConfig.model_validate(model("a", tp=2, upgrade=upgrade))
    topology = Topology.of(config.parallel)
    for room in (True, False):
        monkeypatch.setattr(upgrades, "has_room", lambda *_, room=room: room)
        upgrades.say_what_comes("Classifier", topology, config)
    (record,) = caplog.records
    assert "no node has 2 CPU free for one more group" in record.getMessage()
    assert said in record.getMessage()
    assert "with one group requests wait until the new one has started" in record.getMessage()


@pytest.mark.slow
@pytest.mark.ray
def test_where_a_group_fits_no_request_fails(
    deploy: Deployed, versions: dict[int, Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A new version, other limits, more groups and fewer, one that does not come, and the old file again."""
    url = answering(deploy(config(model(versions[3], release="first"))))
    watchers = Watchers(url)
    watchers.wait_for_answers()
    second = model(versions[4], release="second")
    deploy(config(second))
    settle(deploy, 1)
    wait_for_labels(url, 4)
    assert info(url)["release"] == "second"
    watchers.wait_for_answers()
    first_answers, second_answers = watchers.span(3), watchers.span(4)
    beside_s = first_answers[1] - second_answers[0]
    assert -1 < beside_s < 10, "the second takes over, and is not alternated with"

    before = pids(url)
    deploy(config(second, max_client_batch_size=20))
    wait_for(lambda: info(url)["max_client_batch_size"] == 20, "the new limit")
    deploy(config(second | {"replicas": 2}, max_client_batch_size=20))
    settle(deploy, 2)
    wait_for(lambda: len({*pids(url), *before}) == 2, "the second group answers")
    assert watchers.tally.right == watchers.tally.sent, watchers.tally
    deploy(config(second, max_client_batch_size=20))
    settle(deploy, 1)
    kept = pids(url)

    broken = tmp_path / "broken"
    shutil.copytree(versions[5], broken)
    (broken / "tokenizer.json").write_text("{")
    for source, said in ((tmp_path / "nothing", "there is no directory"), (broken, "tokenizer")):
        deploy(config(model(source)), "DEPLOY_FAILED")
        assert said in deploy.said()
        assert str(source) in deploy.said()
        assert pids(url) == kept, "the version before goes on"
        deploy(config(second, max_client_batch_size=20))
        assert pids(url) == kept, "nothing was replaced, and nothing is"
    tally = watchers.stop()
    record_property("fault", tally.row("new versions, two of them broken; more groups and fewer"))
    assert tally.right == tally.sent, tally


@pytest.mark.nightly
@pytest.mark.ray
def test_where_no_group_fits_the_new_version_waits_or_the_old_one_stops_first(
    deploy: Deployed, versions: dict[int, Path], record_property: Callable[[str, object], None]
) -> None:
    """Of three CPUs a group of two ranks takes two: a second one has to wait."""
    url = deploy(config(model(versions[3], tp=2)))
    settle(deploy, 1)
    wait_for_labels(answering(url), 3)
    watchers, before = Watchers(url), pids(url)
    watchers.wait_for_answers()
    deploy.send(config(model(versions[5], tp=2)))
    wait_for(lambda: "have taken more than 2s to be scheduled" in deploy.said(), "Serve says that it waits")
    assert '{"CPU": 2.0}' in deploy.said()
    assert deploy.applications()["tpray"]["status"] == "DEPLOYING"
    assert pids(url) == before
    deploy(config(model(versions[3], tp=2)))
    assert pids(url) == before, "who does not want to wait deploys the old file again"
    assert watchers.tally.right == watchers.tally.sent, watchers.tally

    deploy(config(model(versions[5], tp=2, upgrade="stop-first")))
    wait_for_labels(url, 5)
    watchers.wait_for_answers()
    tally = watchers.stop()
    record_property("fault", tally.row("a new version with `upgrade: stop-first`, of one group"))
    assert tally.right == tally.sent, "Serve's own proxy keeps requests until there is a group"
    assert tally.longest_s > 1, "for there was none"


@pytest.mark.nightly
@pytest.mark.ray
def test_one_model_of_several_changes_and_the_others_go_on(deploy: Deployed, versions: dict[int, Path]) -> None:
    def several(**models: dict[str, Any]) -> dict[str, Any]:
        return config({"models": models}, "tpray.serving.models:build")

    def ranks(name: str) -> list[int]:
        return pids(f"{url}/models/{name}")

    kept = model(versions[3])
    url = deploy(several(kept=kept, changed=model(versions[4])))
    settle(deploy, 3)
    answering(f"{url}/models/kept")
    answering(f"{url}/models/changed")
    watchers, before = Watchers(f"{url}/models/kept"), ranks("kept")
    changed = Watchers(f"{url}/models/changed", count=2)
    for each in (watchers, changed):
        each.wait_for_answers()
    deploy(several(kept=kept, changed=model(versions[5])))
    settle(deploy, 3)
    wait_for_labels(f"{url}/models/changed", 5)
    for each in (watchers, changed):
        each.wait_for_answers()
    tally = changed.stop()
    assert tally.right == tally.sent, tally
    assert ranks("kept") == before

    health = Health(url)
    deploy(several(kept=kept, new=model(versions[4])))
    settle(deploy, 3)
    answering(f"{url}/models/new")
    gone = httpx.post(f"{url}/v1/rerank", json={"model": "changed", "query": "a", "documents": ["b"]}, timeout=60)
    assert (gone.status_code, gone.json()) == (404, {"message": "there is no model 'changed' here: there is kept, new"})
    assert [each["id"] for each in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]] == ["kept", "new"]
    assert ranks("kept") == before
    assert health.stop() == {200}
    tally = watchers.stop()
    assert tally.right == tally.sent, tally
