"""What the commands print is what was given, brackets included, and all of it on a narrow terminal."""

from __future__ import annotations

import json
import shlex

import pytest
from rich.console import Console

from tpray.commands import console
from tpray.commands.architecture_report import ArchitectureLine
from tpray.commands.check import Check
from tpray.commands.load_generator import Load, Outcome
from tpray.commands.plan_report import PlanLine, PlanReport
from tpray.commands.try_it import curl
from tpray.config import ServeConfig
from tpray.parallel_layers.tasks import TEXT, TOKEN


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_scores(["a [b] c"], [[{"label": "[x]", "score": 0.5}]], as_json=False)
    console.print_checks([Check("store", "s3 [no]", "pip install 'tpray[s3]'")])
    console.print_ready(
        "http://[fd00::1]:1", "./model[1]", ServeConfig(), "curl [a]", ["/", "/docs"], ["[alice]", "bob"]
    )
    printed = capsys.readouterr().out
    for text in (
        "a [b] c",
        "[x]",
        "s3 [no]",
        "tpray[s3]",
        "./model[1]",
        "at http://[fd00::1]:1",
        "  page      http://[fd00::1]:1/\n",
        "  docs      http://[fd00::1]:1/docs\n",
        "  keys      [alice], bob\n",
        "  try it    curl [a]\n",
    ):
        assert text in printed


def test_entities(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"entity_group": "[PER]", "score": 0.5, "word": "tom", "start": 0, "end": 3}
    console.print_entities(["Tom [b]", "nobody"], [[found], []], as_json=False)
    printed = capsys.readouterr().out
    for text in ("Tom [b]", "[PER]", "0.5000", "nobody"):
        assert text in printed


@pytest.mark.parametrize(
    ("task", "labels", "route", "key"),
    [
        (TEXT, ["not_paraphrase", "paraphrase"], "predict", "inputs"),
        (TEXT, ["POSITIVE", "NEGATIVE"], "predict", "inputs"),
        (TEXT, ["LABEL_0"], "rerank", "query"),
        (TEXT, ["no", "yes"], "rerank", "query"),
        (TOKEN, ["O", "B-PER"], "token_classification", "inputs"),
    ],
)
def test_the_command_to_try_fits_the_model(task: str, labels: list[str], route: str, key: str) -> None:
    words = shlex.split(curl("http://h:1", {"task": task, "labels": labels}))
    assert words[1] == f"http://h:1/{route}"
    body = json.loads(words[-1])
    assert key in body
    assert isinstance(body.get("inputs"), list) == ("paraphrase" in labels)
    keyed = shlex.split(curl("http://h:1", {"task": task, "labels": labels}, keyed=True))
    assert keyed[2:4] == ["-H", "authorization: Bearer $TPRAY_API_KEY"]


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(ValueError("no folder [s3]" + " of many" * 40))
    assert capsys.readouterr().err == "tpray: no folder [s3]" + " of many" * 40 + "\n"


INFO = {
    "state": "ready",
    "uptime_s": 90061.0,
    "metrics": {"tpray_queue_tokens": 512.0, "tpray_tokens_per_second": 2048.4},
    "model_id": "organisation/a-model-with-a-long-name",
    "restarts": 2,
    "labels": ["not_paraphrase", "paraphrase"],
    "ranks": [{"rank": 0, "sharded_bytes": 2**20, "replicated_bytes": 0, "cores": [0, 1], "pid": 4711}],
}


def test_the_load_is_in_the_status() -> None:
    assert console.status_line(INFO, healthy=True)[8:] == (
        " healthy, state ready, uptime 1 d 1 h, queue 512 tokens, speed 2048 tokens/s, restarts 2"
    )
    assert console.status_line({"state": "failed"}, healthy=False)[8:] == " unhealthy, state failed, restarts None"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (723, "12 min 3 s"),
        (7320, "2 h 2 min"),
        (3601, "1 h"),
        (90061, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said


@pytest.mark.parametrize("width", [60, 80])
def test_nothing_is_cut_on_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "out", Console(width=width))
    outcome = Outcome(Load(concurrency=32), 100.0, [1234.5] * 12345, 1_234_567)
    outcome.errors["HTTP 503 of a server that is restarting"] = 17
    console.print_outcomes([outcome])
    printed = capsys.readouterr().out
    for text in (
        "32 clients ",
        " 123 12346 1234 1234 1234 1234 12345     17",
        "17 x HTTP 503",
    ):
        assert text in printed, printed
    long = "a-very-long-word-without-a-space" * 3
    console.print_scores([long], [[{"label": long, "score": 0.1234}]], as_json=False)
    console.print_ranking([{"index": 123, "document": long, "score": 0.1234}], as_json=False)
    console.print_entities([long], [[{"entity": "B-PER", "word": long, "score": 0.1234}]], as_json=False)
    lines = [PlanLine("encoder.layer.*.attention.query", "column", 12, 2**30, 2**29, "")]
    console.print_plan(PlanReport(lines, 2, "float32", {1: 2**30, 2: 2**29}))
    architecture = ArchitectureLine(("hunyuan_v1_dense", "bert"), "all of it", "its own plan", "rows are packed")
    console.print_architectures([architecture], markdown=False)
    console.print_checks([Check("memory", long, long)])
    console.out.print(console.status_table(INFO, healthy=True))
    printed = capsys.readouterr().out
    assert "…" not in printed, printed
    assert printed.count("0.1234") == 3
    assert max(len(line) for line in printed.splitlines() if "a rank's weights" not in line) <= width
