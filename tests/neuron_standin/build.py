"""Compile ``device.cpp``; see there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch


def build_device(folder: Path) -> Path:
    """The shared library with the stand-in's device; takes half a minute."""
    root = Path(torch.__file__).parent
    target = folder / "neuron_device.so"
    command = [
        "g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}",
        str(Path(__file__).parent / "device.cpp"), "-o", str(target), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    return target
