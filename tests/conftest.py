"""Fixtures. Only tests marked ``ray`` can start Ray. All share a cache of traced models, unless they ask not to."""

from __future__ import annotations

import fcntl
import gc
import itertools
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.neuron_standin.build import build_device
from tests.small_models import OWN_NAMES, OWN_SETTINGS, SMALL
from tests.text_kinds import save_tokenizer
from tpray.config import environment, stay_quiet
from tpray.parallel_layers.tasks import auto_class

stay_quiet()
# A shell has what it starts in the background ignore Ctrl-C, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those with Ray run one after another; without torch-xla its tests are skipped."""
    for item in items:
        if item.get_closest_marker("xla") is not None and find_spec("torch_xla") is None:
            item.add_marker(pytest.mark.skip(reason="torch-xla is not installed here: `make test-xla`"))
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))


TABLES = {
    "fault": "| fault | sent | answered | refused honestly | lost | wrong | longest time without an answer |",
    "architecture": "| architecture | tp | dtype | all-reduces | all-gathers | difference from transformers |",
    "script": "| script | tp | all-reduces | all-gathers |",
}
"""What tests record, and the head of the table of it that is printed at the end."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what became of the requests in each fault, and what is in each program that torch-xla has lowered."""
    for table, head in TABLES.items():
        rows = [
            value
            for outcome in ("passed", "failed")
            for test in terminalreporter.stats.get(outcome, [])
            for name, value in test.user_properties
            if name == table and test.when == "call"
        ]
        if rows:
            terminalreporter.section(f"by {table}")
            terminalreporter.write_line(head)
            for row in sorted(rows) if table != "fault" else rows:
                terminalreporter.write_line(row)


@pytest.fixture(autouse=True)
def _full_collections_are_short() -> None:
    """What the tests before left stays, so that the collections that ranks ask for do not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole run, also where several processes share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in environment() else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _cache(session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was traced before is not traced again: artifacts are addressed by their content."""
    monkeypatch.setenv("TPRAY_CACHE", str(session_folder / "cache"))


@pytest.fixture
def own_cache(_cache: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at what is traced, or damage it."""
    monkeypatch.setenv("TPRAY_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("ray") is not None:
        if hasattr(request.config, "workerinput"):  # a worker of xdist itself; the variable is inherited by others
            assert request.node.nodeid.endswith("@ray"), (
                "--dist loadgroup is missing, or xdist does not group in this pytest"
            )
    else:
        import ray

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("this test is not marked `ray`, so it must not start Ray")

        monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a small seeded classifier with a tokenizer of its own kind; no bias or norm is zero.

    It is of tokens where ``architectures`` says so: ``["ForTokenClassification"]``.
    """
    made: dict[str, Path] = {}

    def make(model_type: str = "bert", **changes: Any) -> Path:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp(model_type), model_type, changes)
        return made[key]

    return make


def _save(directory: Path, model_type: str, changes: dict[str, Any]) -> Path:
    from transformers import AutoConfig

    tokenizer = save_tokenizer(directory, model_type)
    own: dict[str, Any] = {"vocab_size": max(SMALL["vocab_size"], len(tokenizer))}
    if tokenizer.pad_token_id is not None:
        own["pad_token_id"] = tokenizer.pad_token_id
    names = OWN_NAMES.get(model_type, {})
    usual, wanted = (
        {own_name: value for name, value in sizes.items() for own_name in names.get(name, name).split()}
        for sizes in (SMALL, own | changes)
    )
    config = AutoConfig.for_model(model_type, **(usual | OWN_SETTINGS.get(model_type, {}) | wanted))
    torch.manual_seed(7)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.1, 0.3)  # a bias of zero would hide one that is added twice
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def neuron_device(session_folder: Path) -> Path:
    """The library with the stand-in for TorchNeuron's device, compiled once; the XLA stack has none."""
    if find_spec("torch_xla") is not None:
        return Path("none")
    folder = session_folder / "device"
    with (session_folder / "device.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            build_device(folder)
    return folder / "neuron_device.so"


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that gives a port nobody listens on."""
    import socket

    used = itertools.count()

    def port() -> int:
        next(used)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            number: int = probe.getsockname()[1]
            return number

    return port
