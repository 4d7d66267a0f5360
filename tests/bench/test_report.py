"""The side-by-side's own arithmetic, and that it runs on any CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.figures import Figure, Side
from tests.bench.sections import Run
from tests.bench.servers import Point

_CEILINGS = """
import torch
from tests.bench.micro import gemm_ceiling
from tpray.platforms.cpu import native_dtypes
print([name for name in native_dtypes() if name != "int8" and gemm_ceiling(getattr(torch, name), 1) > 0])
"""


def test_its_ceilings_are_of_the_dtypes_that_the_cpu_multiplies() -> None:
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", _CEILINGS], capture_output=True, text=True, check=False, env=limited)
    assert done.stdout.strip() == "['float32']", done.stderr


def test_a_figure_is_a_ratio_beside_both_its_sides() -> None:
    figure = Figure("p50", 0.9, Side(80.0, "tp 2"), Side(100.0), "ms")
    assert figure.cells == ("p50", "<= 0.9", "0.80", "80 ms (tp 2)", "100 ms", "met")
    assert Figure("rate", 1.2, Side(110.0), Side(100.0), "/s", at_least=True).verdict == "MISSED"
    assert Figure("rate", 1.2, Side(110.0), None, "/s").cells[2:] == ("-", "110 /s", "-", "not measured")


def run_of(tmp_path: Path) -> Run:
    run = Run(tmp_path, ["float32"], True, tmp_path)
    for name, p50_ms in (("tpray tp 1 fp32", 90.0), ("tpray tp 2 fp32", 80.0), ("OpenVINO fp32", 100.0)):
        run.http[name] = {n: Point(n, p50_ms * n, p50_ms * n, 1e3 / p50_ms, 5e4 / p50_ms) for n in (1, 8, 32, 128)}
    return run


def test_the_report_takes_the_better_layout_and_ends_with_the_table_of_targets(tmp_path: Path) -> None:
    text = report.text(run_of(tmp_path), 60.0)
    last = text.rstrip().split("\n\n")[-1].splitlines()
    assert last[0] == "| figure | target | measured | tpray | against |  |"
    assert "| <= 0.9 | 0.80 | 80 ms (tp 2) | 100 ms | met |" in last[2]
    assert next(row for row in last if "second start" in row).endswith("| - | - | - | not measured |")


def test_what_cannot_be_measured_is_named_and_ends_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.serve("a peer", [sys.executable, "-c", "print('no port is free')"], ["a text"], [1])
    assert run.skipped == [f"a peer: {sys.executable} -c print('no port is free') did not start: no port is free"]
    assert f"- {run.skipped[0]}" in report.text(run, 60.0)


def test_the_picture_labels_its_points_with_their_clients(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(run_of(tmp_path), tmp_path / "latency.svg")
    drawn = (tmp_path / "latency.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("OpenVINO fp32", "1", "8", "32", "128"))
