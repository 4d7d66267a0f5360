"""``make`` names a Python that is too old, before it makes an environment of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["serve", "test-xla"])
def test_an_old_python_is_named(target: str, tmp_path: Path) -> None:
    """With a stand-in that says it is old."""
    old = tmp_path / "python3.9"
    script = "import sys; sys.version_info = (3, 9, 2)\n"
    old.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 7\nexec {sys.executable} -c "{script}$2"\n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "deployments/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), target, f"PYTHON={old}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    said = f"tpray needs Python 3.11 or newer, and {old} is 3.9: name another, as in: make PYTHON=python3.12 {target}"
    assert said in done.stderr
    assert not (tmp_path / ".venv").exists()
