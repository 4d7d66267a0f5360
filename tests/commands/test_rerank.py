"""``tpray rerank``: what it prints, and what it refuses before anything is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tpray.commands.cli import main
from tpray.commands.console import print_ranking
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import EmptyInputError
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.local import LocalClassifier


def tpray(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tpray", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    code = left.value.code
    assert isinstance(code, int)
    return code


def test_documents_of_a_file_are_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the embedded demo; blank lines are none."""
    texts = ["Apples are especially bad for your health", "Its headquarters are in Manhattan [NY]", "the firm " * 90]
    file = tmp_path / "documents.jsonl"
    file.write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    asked = "rerank", "The company is based in New York City", "--in", file, "--chunks", "--stride", 3
    assert tpray(monkeypatch, *asked, "--json", "--tp", 1) == 0
    ranking = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(each["index"] for each in ranking) == [0, 1, 2]
    assert all(each["document"] == texts[each["index"]] for each in ranking)
    assert [each["score"] for each in ranking] == sorted((each["score"] for each in ranking), reverse=True)
    file.write_text(json.dumps({"text": "a"}) + "\n\n" + json.dumps({"text": " "}))
    assert tpray(monkeypatch, *asked, "--tp", 1) == 2
    assert "tpray: line 3 is empty: send some text" in capsys.readouterr().err
    print_ranking(ranking[:1], as_json=False)
    assert f"{ranking[0]['score']:.4f}" in capsys.readouterr().out


def test_more_documents_than_a_request_may_have() -> None:
    """In parts, whose scores are ranked together; so are those of chunks."""
    group = ClassifierGroup(ModelConfig(dtype="float32"), FakeExecutor(2))
    texts = [f"{n} " * (1 + n % 9) for n in range(100)]
    with LocalClassifier(group, BatchConfig(max_concurrent_requests=48)) as classifier:
        for chunks in (None, {"max_chunks": 4}):
            ranking = classifier.rerank("a", texts, return_documents=True, chunks=chunks)
            scores = [classifier.rerank("a", [text], chunks=chunks)[0]["score"] for text in texts]
            order = sorted(range(100), key=lambda n: (-scores[n], n))
            assert [each["index"] for each in ranking] == order
            assert [each["document"] for each in ranking] == [texts[n] for n in order]
            assert classifier.rerank("a", texts, top_n=3, chunks=chunks) == [
                {"index": each["index"], "score": each["score"]} for each in ranking[:3]
            ]
        with pytest.raises(EmptyInputError, match="item 99 is empty"):
            classifier.rerank("a", [*texts[:99], " "])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "name documents to rank, or a file of them with --in, and not both"),
        (["a", "b", "--max-chunks", 3], "--max-chunks is a setting of --chunks: give that too"),
        (["a", "b", "--chunks", "--stride", -1], "chunks.stride: input should be greater than or equal to 0"),
        (["a", "--in", "FILE"], "line 2 is a pair or a conversation, and a document is a text alone"),
    ],
)
def test_what_cannot_be_ranked_is_refused_before_a_start(
    arguments: list[object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "documents.jsonl"
    file.write_text('{"text": "a"}\n{"text": "a", "text_pair": "b"}\n')
    named = [file if each == "FILE" else each for each in arguments]
    assert tpray(monkeypatch, "rerank", *named) == 2
    assert words in capsys.readouterr().err
