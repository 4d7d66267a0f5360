"""What lines the processes log, and where they are printed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

import pytest

from tpray import logs
from tpray.logs import JsonLines, Lines, LogSettings, TextLines, printable
from tpray.serving.log_printer import LogPrinter

FORGED = "a\r\nERROR tpray: all is lost\x1b[2J\u2028x"


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "tpray.x", "levelname": "WARNING", "msg": message, "args": arguments} | more)
    return made


def failure() -> logging.LogRecord:
    try:
        raise ValueError(FORGED)
    except ValueError as e:
        return record("it failed", exc_info=(type(e), e, e.__traceback__))


def test_nothing_that_a_client_sends_makes_a_line_of_its_own() -> None:
    text, in_json = TextLines(lambda: {"request_id": FORGED}), JsonLines(dict)
    for each in (record("it said %s", FORGED), record("x", fields={"path": FORGED}), failure()):
        lines = text.format(each).splitlines()
        assert lines[0].startswith("WARNING tpray.x: ")
        assert all(line.startswith("    ") for line in lines[1:])
        assert "\x1b" not in text.format(each)
        (line,) = in_json.format(each).splitlines()
        assert "all is lost" in line
        json.loads(line)


def test_values_are_told_apart() -> None:
    said = TextLines(lambda: {"key": "alice", "trace_id": None}).format(record("request", fields={"path": "/a b=c"}))
    assert said == 'WARNING tpray.x: request key=alice path="/a b=c"'
    assert printable("schön ✓") == "schön ✓"


def test_json_lines_have_what_the_process_does_and_the_rank() -> None:
    made = JsonLines(lambda: {"request_id": "r", "key": "alice", "trace_id": "t"})
    said = json.loads(made.format(record("%d rows", 3, threadName="tpray-rank-1")))
    assert said.pop("time").endswith("Z")
    expected = {"level": "WARNING", "logger": "tpray.x", "message": "3 rows"}
    assert said == expected | {"request_id": "r", "key": "alice", "trace_id": "t", "rank": 1}
    assert "ValueError" in json.loads(made.format(failure()))["exception"]


@pytest.fixture
def printer() -> Iterator[LogPrinter]:
    made = LogPrinter()
    yield made
    made.close()


def test_the_command_prints_what_its_processes_log(printer: LogPrinter, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [Lines(printer.address) for _ in range(3)]
    for handler in handlers:
        handler.setFormatter(TextLines(dict))
        handler.handle(record("ä" * 10_000))
    printer.close()
    printed = capsys.readouterr().err.splitlines()
    assert printed == [f"WARNING tpray.x: {'ä' * 10_000}"] * 3


def test_a_process_does_not_wait_for_a_command_that_prints_nothing(
    printer: LogPrinter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = Lines(printer.address)
    handler.setFormatter(TextLines(dict))
    handler.handle(record("first"))
    real, started = printer._selector.select, time.monotonic()

    def asleep(timeout: float) -> list[object]:
        time.sleep(0.05)
        return []

    monkeypatch.setattr(printer._selector, "select", asleep)
    time.sleep(0.3)
    for _ in range(2000):
        handler.handle(record("x" * 1000))
    assert time.monotonic() - started < 5
    assert handler._lost > 0
    lost = handler._lost
    monkeypatch.setattr(printer._selector, "select", real)
    time.sleep(0.5)
    handler.handle(record("last"))
    printer.close()
    printed = capsys.readouterr().err.splitlines()
    assert printed[-2:] == [
        f"WARNING tpray.logs: {lost} lines were lost here: they came faster than they could be printed",
        "WARNING tpray.x: last",
    ]


def test_where_there_is_no_command_a_process_prints_itself(capfd: pytest.CaptureFixture[str]) -> None:
    handler = Lines("tpray-logs-of-nobody")
    handler.setFormatter(TextLines(dict))
    handler.handle(record("here"))
    assert "WARNING tpray.x: here" in capfd.readouterr().err


def test_the_environment_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_settings", None)
    monkeypatch.setenv("TPRAY_LOG", "info")
    monkeypatch.setenv("TPRAY_LOG_FORMAT", "json")
    assert logs.current() == LogSettings("INFO", "json", "")
