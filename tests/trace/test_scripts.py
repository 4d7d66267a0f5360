"""Scripts as people have them for neuronx-distributed give the unsharded models' outputs at every degree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.trace.scripts import SCRIPTS, Script
from tpray.group.thread_executor import ThreadExecutor
from tpray.trace import parallel_model_load, parallel_model_save, parallel_model_trace

CASES = [pytest.param(script, tp, id=f"{script.name}-{tp}") for script in SCRIPTS for tp in script.degrees]


def check_calls(script: Script, model: Any) -> None:
    reference = script.reference()
    for inputs in script.calls:
        with torch.no_grad():
            expected = reference(*inputs)
        found = model(*inputs)
        assert type(found) is type(expected)
        for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("script", "tp"), CASES)
def test_a_script_gives_what_the_unsharded_model_gives(script: Script, tp: int, tmp_path: Path) -> None:
    with parallel_model_trace(script.make, script.calls[0], tp_degree=tp, executor=ThreadExecutor) as model:
        check_calls(script, model)
        parallel_model_save(model, tmp_path / "saved")
    with parallel_model_load(tmp_path / "saved", executor=ThreadExecutor) as loaded:
        check_calls(script, loaded)
