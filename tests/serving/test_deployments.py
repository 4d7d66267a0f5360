"""Serve's config files: valid, deployed for real, and changed without a restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import ValidationError

from tpray.config import ServeConfig, stay_quiet

FILES = sorted((Path(__file__).parents[2] / "deployments").glob("[!k]*.yaml"))  # kuberay's is a RayService


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_valid_for_serve_and_for_tpray(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications
    for application in schema.applications:
        assert application.import_path == "tpray.serving.app:build"
        ServeConfig.model_validate(application.args)
    assert schema.http_options.host == "127.0.0.1"


def test_serve_build_writes_a_valid_file(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import cli

    target = tmp_path / "serve.yaml"
    done = CliRunner().invoke(cli, ["build", "tpray.serving.app:app", "-o", str(target)])
    assert done.exit_code == 0, done.output
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(target.read_text())).applications
    assert application.import_path == "tpray.serving.app:app"
    assert [deployment.name for deployment in application.deployments] == ["Classifier"]


def test_what_no_argument_is_called_is_refused() -> None:
    """By the annotation of the builder, with which Serve validates what a file says."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from tpray.serving.app import build

    with pytest.raises(ValidationError, match="paralel"):
        call_user_app_builder_with_args_if_necessary(build, {"paralel": {"tp": 2}})


@pytest.fixture
def deploy(free_port: Callable[[], int]) -> Iterator[Callable[[dict[str, Any]], str]]:
    """A function that deploys what a config file holds, as `serve run FILE` does, and gives the URL."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from tpray.group.cluster import start_ray, stop_ray

    stay_quiet()
    port = free_port()
    start_ray(4)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        client: Any = _get_global_client()

        def run(stored: dict[str, Any]) -> str:
            client.deploy_apps(ServeDeploySchema.model_validate(stored))
            give_up = time.monotonic() + 120
            while True:
                found = serve.status().applications
                states = {name: found[name].status for a in stored["applications"] if (name := a["name"]) in found}
                if len(states) == len(stored["applications"]) and set(states.values()) == {"RUNNING"}:
                    return f"http://127.0.0.1:{port}"
                assert "DEPLOY_FAILED" not in states.values(), {n: a.message for n, a in found.items()}
                assert time.monotonic() < give_up, states
                time.sleep(0.2)

        yield run
    finally:
        stop_ray()


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(next(path for path in FILES if path.name == name).read_text())
    return found


@pytest.mark.ray
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


@pytest.mark.ray
def test_two_models_with_groups_of_their_own_sizes(deploy: Callable[[dict[str, Any]], str]) -> None:
    url = deploy(read("multi-model.yaml"))
    for name, tp in (("wide", 2), ("narrow", 1)):
        assert httpx.get(f"{url}/{name}/info", timeout=30).json()["tp_degree"] == tp
        answer = httpx.post(f"{url}/{name}/predict", json={"inputs": ["a b", "a b"]}, timeout=30).json()
        assert answer[0]["label"] == "paraphrase"
