"""What these tests run in: the real torch-xla, and the stand-in for torch-neuronx over it; see `make test-xla`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.neuron_standin import HERE, STACKS

if find_spec("torch_xla") is None or find_spec("jax") is None:
    collect_ignore_glob = ["test_*"]  # `make test-xla` has an environment of its own
else:
    sys.path[:0] = [str(HERE / STACKS["neuron-xla"]), str(HERE / "shared")]


@pytest.fixture(scope="session")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in, which is imported once, marks cores as taken."""
    return tmp_path_factory.mktemp("claims")


@pytest.fixture(autouse=True)
def _environment(claims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these tests alone: others beside them start Ray, which reads some of it, too."""
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-7")
    monkeypatch.setenv("NEURON_STANDIN_DIR", str(claims))
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(claims / "compiler-cache"))


@pytest.fixture
def loaded_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that gets the HLO of every program that is loaded, ``{time}-{rank}.txt``."""
    kept = tmp_path / "programs"
    kept.mkdir()
    monkeypatch.setenv("NEURON_STANDIN_KEEP", str(kept))
    return kept
