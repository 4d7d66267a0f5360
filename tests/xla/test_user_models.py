"""Models that people write, on neuron-xla: lowered by the real torch-xla, executed by XLA, compared unsharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trace.scripts import Script
from tests.trace.test_scripts import CASES, check_calls
from tpray.group.executor import Executor
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms.topology import Topology
from tpray.runtime.neuron.hlo import OPCODES, Lowered
from tpray.trace import parallel_model_load, parallel_model_save, parallel_model_trace

pytestmark = pytest.mark.xla


def on_cores(tp: int) -> Executor:
    return ThreadExecutor(Topology(tp, "neuron-xla", layout="single-process", instance_family="trn1"))


@pytest.mark.parametrize(("script", "tp"), CASES)
def test_a_script_gives_what_the_unsharded_model_gives(
    script: Script, tp: int, tmp_path: Path, loaded_programs: Path, record_property: Callable[[str, object], None]
) -> None:
    model = parallel_model_trace(script.make, script.calls[0], tp_degree=tp, executor=on_cores)
    parallel_model_save(model, tmp_path / "saved")
    with parallel_model_load(tmp_path / "saved", executor=on_cores) as loaded:
        check_calls(script, loaded)
    programs = [Lowered(path.read_text()) for path in sorted(loaded_programs.iterdir())]
    assert len(programs) == tp
    counts = programs[0].opcodes
    record_property("script", f"| {script.name} | {tp} | {counts['all-reduce']} | {counts['all-gather']} |")
    assert set(counts) <= OPCODES
