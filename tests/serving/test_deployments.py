"""Serve's config files: valid, deployed for real, and changed without a restart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel, ValidationError

from tests.neuron_standin import environment
from tests.serving.deployed import Deployed, deployed
from tpray.config import ModelsConfig, ServeConfig
from tpray.serving.access import on_loopback
from tpray.serving.keys import LOOK_EVERY_S

FILES = sorted((Path(__file__).parents[2] / "deployments").glob("[!k]*.yaml"))  # kuberay's is a RayService


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_valid_for_serve_and_for_tpray(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications
    for application in schema.applications:
        form: dict[str, type[BaseModel]] = {
            "tpray.serving.app:build": ServeConfig,
            "tpray.serving.models:build": ModelsConfig,
        }
        form[application.import_path].model_validate(application.args)
    assert schema.http_options.host == "127.0.0.1"


def test_serve_build_writes_a_valid_file(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import cli

    target = tmp_path / "serve.yaml"
    done = CliRunner().invoke(cli, ["build", "tpray.serving.app:app", "-o", str(target)])
    assert done.exit_code == 0, done.output
    written = ServeDeploySchema.model_validate(yaml.safe_load(target.read_text()))
    assert not on_loopback(written.http_options.host), "so that a replica of it needs a key"
    (application,) = written.applications
    assert application.import_path == "tpray.serving.app:app"
    assert [deployment.name for deployment in application.deployments] == ["Classifier"]


def test_what_no_argument_is_called_is_refused() -> None:
    """By the annotation of the builder, with which Serve validates what a file says."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from tpray.serving.app import build

    with pytest.raises(ValidationError, match="paralel"):
        call_user_app_builder_with_args_if_necessary(cast(FunctionType, build), {"paralel": {"tp": 2}})


@pytest.fixture(scope="module")
def deploy(
    request: pytest.FixtureRequest, neuron_device: Path, tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
) -> Iterator[Callable[[dict[str, Any]], str]]:  # fmt: skip
    """A function that hands what a config file holds to `serve deploy`, waits until it runs, and gives the URL.

    The Ray is in an environment with the stand-ins of one stack.
    """
    folder = tmp_path_factory.mktemp("deploy")
    with deployed(folder, free_port, 4, **environment(request.param.split()[-1], folder, neuron_device)) as run:
        yield run


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(next(path for path in FILES if path.name == name).read_text())
    return found


def on(stack: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("deploy", [stack], indirect=True, scope="module")


@pytest.mark.slow
@pytest.mark.ray
@on("cpu and neuron")
def test_limits_change_without_a_restart(deploy: Callable[[dict[str, Any]], str]) -> None:
    config = read("local-cpu.yaml")
    url = deploy(config)
    before = httpx.get(f"{url}/info", timeout=30).json()
    assert before["max_client_batch_size"] == 32
    three = {"inputs": [["a"], ["b"], ["c"]]}
    assert httpx.post(f"{url}/predict", json=three, timeout=30).status_code == 200
    config["applications"][0]["deployments"][0]["user_config"]["max_client_batch_size"] = 2
    deploy(config)
    after = httpx.get(f"{url}/info", timeout=30).json()
    assert after["max_client_batch_size"] == 2
    assert after["ranks"] == before["ranks"], "the ranks are the same processes"
    assert httpx.post(f"{url}/predict", json=three, timeout=30).status_code == 413


@pytest.mark.nightly
@pytest.mark.ray
@on("open to others, neuron")
def test_a_file_that_lets_others_in_needs_a_key(deploy: Callable[[dict[str, Any]], str], tmp_path: Path) -> None:
    config = read("local-cpu.yaml")
    config["http_options"]["host"] = "0.0.0.0"
    args = config["applications"][0]["args"]
    with pytest.raises(AssertionError, match=r"http_options.host 0.0.0.0 lets others on the network ask"):
        deploy(config)
    args["access"] = {"keys_file": str(tmp_path / "keys")}
    (tmp_path / "keys").write_text("alice: alice-0123456789\n")
    url, body = deploy(config), {"inputs": "a b c"}
    assert httpx.post(f"{url}/predict", json=body, timeout=30).status_code == 401
    shown = {"authorization": "Bearer alice-0123456789"}
    assert httpx.post(f"{url}/predict", json=body, headers=shown, timeout=30).status_code == 200
    (tmp_path / "keys").write_text("bob: bob-0123456789\n")
    time.sleep(LOOK_EVERY_S)
    assert httpx.post(f"{url}/predict", json=body, headers=shown, timeout=30).status_code == 401


def samples(text: str, name: str) -> list[Sample]:
    """Of one name, in Prometheus's text format."""
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples if sample.name == name]


@pytest.mark.slow
@pytest.mark.ray
@on("cpu and neuron")
def test_a_scrape_has_all_groups_and_says_which_do_not_answer(deploy: Deployed) -> None:
    """The same figures come from Ray's own agent."""
    config = read("local-cpu.yaml")
    own = {"release": "groups that have answered nobody", "upgrade": "stop-first"}
    config["applications"][0]["args"] |= own | {"replicas": 2, "parallel": {"tp": 2, "cores_per_rank": 1}}
    url = deploy(config)

    def scraped(name: str) -> list[Sample]:
        return samples(httpx.get(f"{url}/metrics", timeout=30).text, name)

    for _ in range(20):
        assert httpx.post(f"{url}/predict", json={"inputs": ["a b", "a b"]}, timeout=30).status_code == 200
    ranks = {(each.labels["replica"], each.labels["rank"]) for each in scraped("tpray_rank_memory_bytes")}
    replicas = {replica for replica, _ in ranks}
    assert ranks == {(replica, rank) for replica in replicas for rank in "01"}
    assert len(replicas) == 2
    answered = {each.labels["replica"]: each.value for each in scraped("tpray_rows_total")}
    assert sum(answered.values()) == 20
    for name in ("compute", "wait"):
        assert {each.value > 0 for each in scraped(f"tpray_rank_{name}_seconds_total")} == {True}
    assert [each.value for each in scraped("tpray_replicas_missing")] == [0]

    told: dict[str, float] = {}
    give_up = time.monotonic() + 60
    while told != {replica: value for replica, value in answered.items() if value}:
        assert time.monotonic() < give_up, told
        time.sleep(1)
        text = httpx.get(deploy.metrics_url, timeout=30).text
        rows = {each.labels["replica"]: each.value for each in samples(text, "ray_tpray_rows_total")}
        told = {replica: value for replica, value in rows.items() if replica in answered}  # and not of those before
    seen = {each.labels["replica"]: each.value for each in samples(text, "ray_tpray_step_seconds_count")}
    assert {replica: seen[replica] for replica in told} == told, "each row was a step of its own"

    pids = set[int]()
    while len(pids) < 2:
        pids.add(httpx.get(f"{url}/info", timeout=30).json()["group"]["pid"])
    stopped = pids.pop()
    os.kill(stopped, signal.SIGSTOP)
    try:
        missing = None
        for _ in range(10):
            with suppress(httpx.TimeoutException):  # it may be the one that is asked
                text = httpx.get(f"{url}/metrics", timeout=4).text
                missing = [each.value for each in samples(text, "tpray_replicas_missing")]
                break
        assert missing == [1]
        assert len(samples(text, "tpray_rows_total")) == 1
    finally:
        os.kill(stopped, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.ray
@on("cpu and neuron")
def test_two_models_with_groups_of_their_own_sizes(deploy: Callable[[dict[str, Any]], str]) -> None:
    url = deploy(read("multi-model.yaml"))
    for name, tp in (("wide", 2), ("narrow", 1)):
        assert httpx.get(f"{url}/{name}/info", timeout=30).json()["tp_degree"] == tp
        answer = httpx.post(f"{url}/{name}/predict", json={"inputs": ["a b", "a b"]}, timeout=30).json()
        assert answer[0]["label"] == "paraphrase"


@pytest.mark.slow
@pytest.mark.ray
@on("cpu and neuron")
def test_two_models_chosen_by_name(deploy: Callable[[dict[str, Any]], str]) -> None:
    url = deploy(read("models-by-name.yaml"))
    pair = {"inputs": ["a b", "a b"]}
    for name, tp in (("paraphrases", 2), ("org/paraphrases-float32", 1)):
        assert httpx.get(f"{url}/models/{name}/info", timeout=30).json()["tp_degree"] == tp
        answer = httpx.post(f"{url}/models/{name}/predict", json=pair, timeout=30)
        assert answer.json()[0]["label"] == "paraphrase"
        asked = {"model": name, "query": "a b", "documents": ["a b"]}
        assert httpx.post(f"{url}/v1/rerank", json=asked, timeout=30).json()["model"] == name
    assert httpx.post(f"{url}/predict", json=pair, timeout=30).status_code == 422
    counted: dict[str, float] = {}
    for sample in samples(httpx.get(f"{url}/metrics", timeout=30).text, "tpray_rows_total"):
        counted[sample.labels["model"]] = sample.value
    assert counted == {"paraphrases": 2, "org/paraphrases-float32": 2}
    other = httpx.post(f"{url}/v1/rerank", json=asked | {"model": "other"}, timeout=30)
    assert (other.status_code, "there is no model 'other'" in other.text) == (404, True)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("deploy", "family", "tp"),
    [
        pytest.param("neuron-xla", "inf2", 2, marks=pytest.mark.xla),
        pytest.param("neuron-xla", "trn1", 2, marks=pytest.mark.xla),
        pytest.param("cpu and neuron", "trn2", 4, marks=pytest.mark.slow),
    ],
    indirect=["deploy"], scope="module",
)  # fmt: skip
def test_the_files_for_neuron_serve_on_stand_ins(deploy: Callable[[dict[str, Any]], str], family: str, tp: int) -> None:
    url = deploy(read(f"{family}.yaml"))
    info = httpx.get(f"{url}/info", timeout=30).json()
    assert info["runtime"] == ("neuron" if family == "trn2" else "neuron-xla")
    cores = [core for rank in info["ranks"] for core in rank["cores"]]
    assert cores == list(range(cores[0], cores[0] + tp)), (
        "neighbours; a group that is replaced may still hold the first"
    )
    answer = httpx.post(f"{url}/predict", json={"inputs": ["a b", "a b"]}, timeout=30).json()
    assert answer[0]["label"] == "paraphrase"
