"""The README's line for each dialect, as a user would run it, against the demo on loopback."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.loopback import loopback

README = (Path(__file__).parents[2] / "README.md").read_text()
LINES = re.findall(r"`([^`]+)` \|$", README.partition("### Dialects\n")[2].partition("\n\n- ")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with loopback() as server:
        yield server.url


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition("(")[0])
def test_a_line_of_each_dialect_is_answered(line: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    changed = line.replace("http://127.0.0.1:8000", url).replace("127.0.0.1:8000", url.removeprefix("http://"))
    assert changed != line
    module = line.partition("(")[0].rpartition(".")[0]
    importlib.import_module(module)
    package = module.partition(".")[0]
    answer = eval(changed, {package: importlib.import_module(package)})  # the README's own
    assert answer


def test_there_is_a_line_of_each_dialect() -> None:
    assert len(LINES) >= 5
