"""The shorter form of ``python -m tests.bench.scale``: nodes of Ray die under load, and their groups come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HONEST = {"200", "429", "503"}
"""What may become of a request: an answer, or a refusal that asks to come again."""


@pytest.mark.nightly
@pytest.mark.ray
def test_groups_outlive_the_loss_of_a_node_and_of_a_zone(free_port: Callable[[], int]) -> None:
    """Groups with simulated ranks; those that are left answer, and nobody gets a wrong answer."""
    arguments = ["lose", "--nodes", "4", "--groups", "4", "--cpus", "1", "--busy", "0.3", "--limit", "250"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.scale", *arguments, "--port", str(free_port())], capture_output=True,
        text=True, timeout=300, check=False, cwd=Path(__file__).parents[2], env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lost = json.loads(done.stdout.splitlines()[-1])["lose"]
    assert set(lost) == {"node", "zone"}, done.stderr[-3000:]
    assert lost["node"]["groups_lost"] == 1, "groups lie on as many nodes as there are"
    assert lost["zone"]["groups_lost"] == 2
    for what in lost.values():
        outcomes = what["outcomes"]
        assert set(outcomes) <= HONEST | {"ServerDisconnectedError", "ClientOSError"}, outcomes
        assert outcomes["200"] > 0.8 * what["requests"], outcomes
