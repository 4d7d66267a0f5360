"""What this machine's cores multiply themselves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tpray.errors import ConfigError
from tpray.platforms.cpu import CpuPlatform, native_dtypes


@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE", "ALL"])
def test_a_dtype_is_native_only_where_onednn_computes_in_it(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    if "bfloat16" not in native_dtypes():
        return
    asked = "import torch; print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    printed = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=os.environ)
    assert printed.stdout.strip() == "True"


def test_what_onednn_is_told_not_to_use_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert native_dtypes() == ("float32",)
    assert CpuPlatform().choose_dtype("auto") == "float32"
    with pytest.raises(ConfigError, match=r"does not multiply bfloat16 itself.*use --dtype float32 or auto"):
        CpuPlatform().choose_dtype("bfloat16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert "bfloat16" not in native_dtypes()
