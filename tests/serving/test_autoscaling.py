"""Groups follow the token backlog, and come back on another node: with real Ray nodes, each scenario on its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from tests.neuron_standin import environment
from tpray.config import ServeConfig
from tpray.serving.autoscaling import RECENT_TOKENS, TokenBacklog, wanted_replicas
from tpray.serving.metrics import QUEUE_TOKENS


@pytest.mark.parametrize(
    ("backlogs", "replicas", "wanted"),
    [
        ([0.0], 1, 1),
        ([4000.0], 1, 1),
        ([4001.0], 1, 2),
        ([9000.0, 3500.0], 2, 4),
        ([2100.0, 100.0], 2, 2),
        ([900.0, 900.0], 2, 1),
        ([0.0, 0.0, 0.0], 3, 2),
    ],
)
def test_waiting_tokens_call_for_groups(backlogs: list[float], replicas: int, wanted: int) -> None:
    """More at once; fewer one at a time, and only with half of the backlog that one fewer could have."""
    assert wanted_replicas(backlogs, replicas, 4000) == wanted


def test_the_policy_keeps_what_is_while_nobody_reports() -> None:
    policy = TokenBacklog(100)
    assert policy(SimpleNamespace(aggregated_metrics={}, target_num_replicas=3)) == (3, {})
    assert policy(context(1, backlog=250.0)) == (3, {})


@pytest.mark.parametrize(
    ("replicas", "requests", "recent", "least", "wanted"),
    [
        (0, 0.0, None, 0, 0),
        (0, 1.0, None, 0, 1),  # it waits for a group
        (1, 0.0, 0.0, 0, 0),
        (1, 0.0, 8.0, 0, 1),  # nothing waits, but there are requests
        (1, 1.0, 0.0, 0, 1),
        (1, 0.0, 0.0, 1, 1),
        (2, 0.0, 0.0, 0, 1),  # one at a time
        (1, 0.0, None, 0, 1),  # it has not said yet
    ],
)
def test_the_last_group_goes_when_nobody_asks(
    replicas: int, requests: float, recent: float | None, least: int, wanted: int
) -> None:
    assert TokenBacklog(100)(context(replicas, 0.0, requests, recent, least)) == (wanted, {})


def context(
    replicas: int, backlog: float, requests: float = 0.0, recent: float | None = None, least: int = 1
) -> SimpleNamespace:
    """What Serve says to a policy."""
    metrics = {QUEUE_TOKENS.name: {"a": backlog}} | ({} if recent is None else {RECENT_TOKENS: {"a": recent}})
    return SimpleNamespace(
        aggregated_metrics=metrics if replicas else {}, target_num_replicas=replicas, total_num_requests=requests,
        capacity_adjusted_min_replicas=least,
    )  # fmt: skip


def test_a_range_and_a_number_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        ServeConfig.model_validate({"replicas": 2, "autoscaling": {"max_replicas": 4}})
    with pytest.raises(ValidationError, match="below min_replicas"):
        ServeConfig.model_validate({"autoscaling": {"min_replicas": 3, "max_replicas": 2}})


def scenario(name: str, port: int, **environ: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.cluster_scenarios", name, str(port)], capture_output=True, text=True,
        timeout=300, check=False, cwd=Path(__file__).parents[2], env=os.environ | environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    events: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return events


@pytest.mark.nightly
@pytest.mark.ray
def test_a_second_group_comes_with_the_load_and_goes_with_it(free_port: Callable[[], int]) -> None:
    events = scenario("load", free_port())
    assert events["one group"] < events["a second group"] < events["the second group's end"]
    assert events["answered"] > 0


@pytest.mark.nightly
@pytest.mark.ray
def test_a_group_on_a_new_node_starts_from_the_store(free_port: Callable[[], int]) -> None:
    events = scenario("join", free_port())
    assert events["one group"] <= events["a node joins"] < events["the second group's answer"]
    assert 0 < events["its phases"] < events["the second group's answer"] - events["a node joins"]


@pytest.mark.nightly
@pytest.mark.ray
def test_without_requests_there_is_no_group_and_a_request_brings_one(free_port: Callable[[], int]) -> None:
    events = scenario("zero", free_port())
    assert events["one group"] < events["no group"] < events["an answer"]
    assert events["seconds to answer 2"] < events["seconds to answer 1"]


@pytest.mark.nightly
@pytest.mark.ray
def test_a_group_comes_back_on_another_node(free_port: Callable[[], int]) -> None:
    events = scenario("death", free_port())
    assert events["a node is killed"] < events["its group on another node"] <= events["an answer"]


@pytest.mark.nightly
@pytest.mark.ray
def test_a_node_type_with_neuron_cores_is_added_for_a_group(
    neuron_device: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """By Ray's autoscaler with its own stand-in for a cloud, which insists on port 6379."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("somebody listens on port 6379, the only one that Ray's stand-in for a cloud knows")
    environ = environment("neuron", tmp_path, neuron_device)
    del environ["RAY_OVERRIDE_RESOURCES"]  # the autoscaler says what its nodes have
    events = scenario("grow", free_port(), **environ)
    assert events["a head alone"] < events["one group"] <= events["an answer"]
