"""A JSONL file in and out, on ranks without a model: every line comes back, in its place, with what it had."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tpray.commands import classify_file as module
from tpray.commands.classify_file import Counts, How, classify_file
from tpray.commands.records import check_source, check_target, partial_file
from tpray.data.columns import Columns
from tpray.errors import ConfigError
from tpray.group.fake_executor import FakeExecutor, fake_logits
from tpray.group.wire import Frame, Kind
from tpray.serving.chunks import Chunks
from tpray.serving.local import LocalClassifier


def run(classifier: LocalClassifier, folder: Path, text: str | bytes, **options: Any) -> tuple[list[Any], Counts]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    check_source(str(source), Columns())
    check_target(str(source), str(target), options.get("resume", False))
    counts = classify_file(classifier, str(source), str(target), Console(stderr=True), How(**options))
    assert not partial_file(str(target)).exists()
    return [json.loads(line) if line else None for line in target.read_text().split("\n")[:-1]], counts


def test_lines_keep_their_places_blank_ones_too(classifier: LocalClassifier, tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "text": "a"}',
        "",
        "not json",
        '{"id": 4, "text": ""}',
        "   ",
        '{"id": 6, "text": "b", "text_pair": "c"}',
    ]
    records, counts = run(classifier, tmp_path, "\n".join(lines) + "\n")
    assert [r and r.get("id") for r in records] == [1, None, None, 4, None, 6]
    assert [r and "error" in r for r in records] == [False, None, True, True, None, False]
    assert records[2]["line"] == 3
    assert records[3]["error"] == "line 4 is empty: send some text"
    assert str(counts) == "2 classified, 2 refused (lines 3, 4)"


def test_a_line_that_is_too_deep_is_refused(classifier: LocalClassifier, tmp_path: Path) -> None:
    records, counts = run(classifier, tmp_path, "[" * 100_000 + '\n{"text": "a"}\n')
    assert "is not valid JSON: maximum recursion depth" in records[0]["error"]
    assert (counts.classified, counts.refused) == (1, [1])


def test_what_a_line_has_is_not_overwritten(classifier: LocalClassifier, tmp_path: Path) -> None:
    gold = {"text": "a", "label": "gold", "score": 7}
    records, _ = run(classifier, tmp_path, json.dumps(gold) + "\n" + json.dumps({"text": "", "error": "old"}) + "\n")
    assert {k: records[0][k] for k in gold} == gold
    assert records[0]["tpray_label"] in ("paraphrase", "not_paraphrase")
    assert records[0]["tpray_score"] == records[0]["tpray_scores"][0]["score"]
    assert (records[1]["error"], records[1]["tpray_error"]) == ("old", "line 2 is empty: send some text")


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""], ids=["with a byte order mark", "without"])
def test_a_byte_order_mark_is_not_text(start: bytes, classifier: LocalClassifier, tmp_path: Path) -> None:
    records, counts = run(classifier, tmp_path, start + '{"text": "café"}\n'.encode())
    assert counts.classified == 1
    assert records[0]["text"] == "café"


def test_logits_that_are_not_finite_are_their_lines_error(
    classifier: LocalClassifier, executor: FakeExecutor, tmp_path: Path
) -> None:
    bad = classifier._engine.codec.encode(["bad"])[0].ids[1]

    def answer(frame: Frame) -> Frame:
        logits = fake_logits(frame.tensors[0], frame.tensors[1])
        logits[(frame.tensors[0] == bad).any(axis=1)] = np.nan
        return Frame(Kind.RESULT, frame.step, (logits,), 1)

    executor.answer(0, answer)
    records, counts = run(classifier, tmp_path, '{"text": "a"}\n{"text": "bad"}\n{"text": "b"}\n')
    assert ["error" in record for record in records] == [False, True, False]
    assert "line 2 gets logits that are not finite" in records[1]["error"]
    assert counts.refused == [2]


def test_an_interrupted_run_goes_on_where_it_was(
    classifier: LocalClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost, classified twice or put in another place, and the partial file is named."""
    text = "".join(json.dumps({"id": i, "text": f"text {i}"}) + "\n" for i in range(200))
    answers, done = module._answers, 0

    def interrupted(*args: Any) -> Iterator[Any]:
        nonlocal done
        for answer in answers(*args):
            if done == 120:
                raise KeyboardInterrupt
            done += 1
            yield answer

    monkeypatch.setattr(module, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(classifier, tmp_path, text)
    partial = tmp_path / ".out.jsonl.partial"
    assert f"{partial} has the lines that are done: go on with --resume" in capsys.readouterr().err.replace("\n", "")
    with pytest.raises(ConfigError, match=r"\.out\.jsonl\.partial is left from a run that was interrupted"):
        run(classifier, tmp_path, text)
    partial.write_bytes(partial.read_bytes() + b'{"id": 120, "te')  # what a kill -9 leaves
    monkeypatch.setattr(module, "_answers", answers)
    records, counts = run(classifier, tmp_path, text, resume=True)
    assert [record["id"] for record in records] == list(range(200))
    assert (counts.kept, counts.classified) == (120, 80)


def test_another_inputs_partial_file_is_refused(classifier: LocalClassifier, tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.partial").write_text('{"text": "of another file", "label": "x"}\n')
    with pytest.raises(ConfigError, match="is not of this input: its line 1 answers another text"):
        run(classifier, tmp_path, '{"text": "a"}\n', resume=True)
    assert (tmp_path / ".out.jsonl.partial").exists()


def test_an_empty_file_is_no_error(classifier: LocalClassifier, tmp_path: Path) -> None:
    records, counts = run(classifier, tmp_path, "")
    assert (records, str(counts)) == ([], "0 classified, 0 refused")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "id;text\n1;the firm\n", "looks like a table: give a CSV file a name that ends in .csv"),
        ("absent.jsonl", None, "there is no file"),
    ],
)
def test_what_cannot_be_read_is_named_before_anything_starts(
    name: str, text: str | None, words: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        check_source(str(tmp_path / name), Columns())


def test_standard_input_cannot_be_resumed() -> None:
    with pytest.raises(ConfigError, match="reads its input again"):
        check_target("-", "out.jsonl", True)
    assert sys.stdin is not None


def test_long_lines_are_read_in_chunks(classifier: LocalClassifier, executor: FakeExecutor, tmp_path: Path) -> None:
    """However many they are, no more chunks are queued than may wait; a line with too many chunks is refused."""
    most = classifier.group.artifact.manifest.model.max_length
    text = "a " * (15 * (most - 2 - most // 8))
    lines = [json.dumps({"text": text}) for _ in range(80)]
    lines += [json.dumps({"text": text * 2}), json.dumps({"messages": [{"role": "user", "content": "a"}]})]
    records, counts = run(classifier, tmp_path, "\n".join(lines), chunks=Chunks())
    assert counts.classified == 80
    assert counts.refused == [81, 82]
    assert "and 16 chunks (max_chunks) hold" in records[80]["error"]
    assert "only texts are read in chunks" in records[81]["error"]
    assert records[0]["scores"] == classifier.classify(text, chunks=True)
