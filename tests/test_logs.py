"""What lines the processes log, and where they are printed."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
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


def test_a_line_that_is_too_long_to_be_sent_is_printed_here_and_later_ones_are_sent(
    printer: LogPrinter, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", here)
    lines = Lines(printer.address)
    lines.setFormatter(JsonLines(dict))
    lines.handle(record("x", fields={"path": "\u2713" * 100_000}))
    lines.handle(record("short"))
    printer.close()
    assert len(here.getvalue()) > 600_000
    assert "short" in capfd.readouterr().err


def test_of_a_long_traceback_the_end_is_kept() -> None:
    def fail(deeper: int) -> None:
        if not deeper:
            raise ValueError("the reason")
        exec("\n" * deeper + "fail(deeper - 1)", {"fail": fail, "deeper": deeper})

    try:
        fail(300)
    except ValueError as e:
        text = TextLines(dict).format(record("x", exc_info=(type(e), e, e.__traceback__)))
    assert len(text) < 33_000
    assert text.endswith("ValueError: the reason")
    assert all(line.startswith("    ") for line in text.splitlines()[1:])


def test_a_process_does_not_wait_for_a_command_that_accepts_nobody() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0tpray-logs-of-a-test")
        listener.listen(0)
        began = time.monotonic()
        made = [Lines("tpray-logs-of-a-test") for _ in range(4)]
        for lines in made:
            lines.handle(record("x"))
        assert time.monotonic() - began < 2
        for lines in made:
            if lines._socket is not None:
                lines._socket.close()
