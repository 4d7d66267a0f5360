"""Exported programs on disk: what is loaded computes what was traced, and names nothing but arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tpray.errors import ArtifactError
from tpray.runtime.exported import as_module, export, graph_file, load_programs, save_programs


def test_a_stored_program_computes_the_same(tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).eval(), torch.randn(2, 4)
    save_programs(export(module, [(x,)]), tmp_path)
    (program,) = load_programs(tmp_path)
    with torch.inference_mode():
        assert torch.equal(as_module(program)(x), module(x))


@pytest.mark.parametrize(
    "name", ["os.system", "_operator.methodcaller", "torch.ops.aten.from_file.default", "torch.load", "math.prod"]
)
def test_a_program_that_calls_anything_else_is_refused(name: str, tmp_path: Path) -> None:
    save_programs(export(nn.Linear(4, 3).eval(), [(torch.randn(2, 4),)]), tmp_path)
    path = tmp_path / graph_file(0)
    path.write_text(path.read_text().replace("torch.ops.aten.linear.default", name, 1))
    with pytest.raises(ArtifactError, match=f"calls {name}, which"):
        load_programs(tmp_path)
