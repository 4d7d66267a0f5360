"""What the commands print is what was given, brackets included."""

from __future__ import annotations

import pytest

from tpray.commands import console
from tpray.commands.check import Check
from tpray.config import ServeConfig
from tpray.parallel_layers.tasks import TEXT, TOKEN


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_scores(["a [b] c"], [[{"label": "[x]", "score": 0.5}]], as_json=False)
    console.print_checks([Check("store", "s3 [no]", "pip install 'tpray[s3]'")])
    console.print_ready("http://[fd00::1]:1", "./model[1]", ServeConfig(), TEXT)
    printed = capsys.readouterr().out
    for text in (
        "a [b] c",
        "[x]",
        "s3 [no]",
        "tpray[s3]",
        "./model[1]",
        "at http://[fd00::1]:1",
        "  http://[fd00::1]:1/docs",
    ):
        assert text in printed


def test_entities_and_a_command_to_ask_for_some(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"entity_group": "[PER]", "score": 0.5, "word": "tom", "start": 0, "end": 3}
    console.print_entities(["Tom [b]", "nobody"], [[found], []], as_json=False)
    console.print_ready("http://[fd00::1]:1", "model", ServeConfig(), TOKEN)
    printed = capsys.readouterr().out
    for text in ("Tom [b]", "[PER]", "0.5000", "nobody", "curl http://[fd00::1]:1/token_classification"):
        assert text in printed


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(ValueError("no folder [s3]" + " of many" * 40))
    assert capsys.readouterr().err == "tpray: no folder [s3]" + " of many" * 40 + "\n"
