"""On a machine with NeuronCores: `make test-device`. Writes neuron-report.json, to be sent back with what went wrong.

Every test runs on the cores that are there, with the family's degrees that fit them and a model with heads enough.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import tpray
from tests.device.conftest import ENDED
from tests.helpers import rows
from tpray.artifacts.manifest import versions
from tpray.commands.machine_checks import examine
from tpray.config import AUTO, environment
from tpray.errors import GroupError
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms import platform_for
from tpray.platforms.neuron import DEGREES as FAMILY_DEGREES
from tpray.platforms.neuron import instance_family
from tpray.serving.local import LocalClassifier

RUNTIME = environment().get("TPRAY_TEST_RUNTIME", platform_for(AUTO).name)  # of the stand-ins
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(RUNTIME == "cpu", reason="this machine has no /dev/neuron0, or no torch-neuronx"),
]
REPORT = Path("neuron-report.json")
FAMILY = cast(Any, environment().get("TPRAY_TEST_FAMILY", instance_family()))  # of the stand-ins, too
CORES = int(environment().get("TPRAY_TEST_CORES", "2"))
DEGREES = [tp for tp in FAMILY_DEGREES[FAMILY or "inf2"] if tp <= CORES]
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the largest logit; a guess until hardware has been seen


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    """What the report holds."""
    return {
        "machine": platform.platform(),
        "family": FAMILY,
        "runtime": RUNTIME,
        "versions": versions(RUNTIME),
        "doctor": [[check.name, check.value, check.problem] for check in examine()],
    }


@pytest.fixture
def report(request: pytest.FixtureRequest, findings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The report, which is written after each test: whatever ends the next one, this is not lost."""
    yield findings
    findings.setdefault("outcomes", {})[request.node.name] = request.node.stash.get(ENDED, "passed")
    REPORT.write_text(json.dumps(findings, indent=1) + "\n")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(num_attention_heads=64, hidden_size=512, intermediate_size=1024, max_position_embeddings=80)


def start(checkpoint: Path, tp: int, dtype: Any = "float32") -> LocalClassifier:
    return tpray.load(checkpoint, tp=tp, runtime=RUNTIME, dtype=dtype, buckets="1x16,8x64", instance_family=FAMILY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", DEGREES)
def test_parity_with_the_cpu(tp: int, dtype: str, report: dict[str, Any], checkpoint: Path) -> None:
    ids, mask, types = rows([5, 11, 3, 16, 40, 64, 2, 9], 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with tpray.load(checkpoint, tp=1, runtime="cpu", dtype="float32", executor=ThreadExecutor(1)) as reference:
        wanted = reference.logits(**inputs)
    with start(checkpoint, tp, dtype) as classifier:
        got = classifier.logits(**inputs)
        phases = {p.name: round(p.seconds, 2) for p in classifier.phases}
        cores = [info.cores for info in classifier.group.workers]
    difference = float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))
    report[f"parity tp {tp} {dtype}"] = {"difference": difference, "phases_s": phases, "cores": cores}
    assert difference <= TOLERANCE[dtype]


def test_cores_are_free_after_a_kill(report: dict[str, Any], checkpoint: Path) -> None:
    tp = DEGREES[-1]
    with start(checkpoint, tp) as classifier:
        for info in classifier.group.workers:
            os.kill(info.pid, signal.SIGKILL)
        started, failures = time.monotonic(), 0
        while True:
            try:
                assert classifier.classify("a b c")
                break
            except GroupError:
                failures += 1
                assert time.monotonic() - started < 300, "the cores did not come back"
                time.sleep(1)
        report["cores are free after kill -9"] = {"tp": tp, "seconds": time.monotonic() - started, "failures": failures}


@pytest.mark.parametrize("tp", DEGREES)
def test_latency(tp: int, report: dict[str, Any], checkpoint: Path) -> None:
    with start(checkpoint, tp, "bfloat16") as classifier:
        for batch, length in ((1, 16), (8, 64)):
            ids = np.full((batch, length), 7)
            seconds = []
            for _ in range(60):
                before = time.perf_counter()
                classifier.logits(input_ids=ids)
                seconds.append(time.perf_counter() - before)
            ordered = sorted(seconds[10:])
            report[f"latency tp {tp} [{batch}, {length}]"] = {
                "p50_ms": 1e3 * statistics.median(ordered),
                "p90_ms": 1e3 * ordered[int(0.9 * len(ordered))],
            }
