"""The command line itself: help, examples, completion, and one true sentence for what cannot be taken."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, cast

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from tpray.artifacts.store import file_system
from tpray.commands.cli import app, main
from tpray.commands.examples import EXAMPLES
from tpray.errors import ConfigError
from tpray.installation import install_command

COMMANDS = cast(TyperGroup, get_command(app))


def tpray(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tpray", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_each_commands_help_ends_with_examples_that_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tpray(monkeypatch, name, "--help") == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for example, meaning in EXAMPLES[name]:
        assert f"{example} # {meaning}" in shown
        words = shlex.split(example)
        assert words[:2] == ["tpray", name]
        with COMMANDS.make_context("tpray", words[1:]) as context:
            found = COMMANDS.resolve_command(context, words[1:])[1]
            assert found is not None
            found.make_context(name, words[2:], parent=context)  # raises what the command would refuse


def test_nothing_of_a_narrow_help_is_cut() -> None:
    environ = os.environ | {"COLUMNS": "60"}
    code = (
        "import sys\nfrom tpray.commands.cli import app\n"
        "for c in sys.argv[1:]: app([c, '--help'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS.commands],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "…" not in done.stdout
    for command in COMMANDS.commands.values():
        for option in command.params:
            assert option.opts[0] in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_had(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Without it typer shows that of the shell that it was started from, which may be one that it does not know.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert tpray(monkeypatch, "--show-completion", shell) == 0
    assert "_TPRAY_COMPLETE=complete_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "arguments", "said"),
    [
        ({"TPRAY_PORT": "abc"}, "serve", "TPRAY_PORT=abc: input should be a valid integer"),
        ({"TPRAY_TP": "-1"}, "serve", "TPRAY_TP=-1: '-1' is neither a number from 1 nor auto"),
        ({"TPRAY_FOR": "speed"}, "serve", "TPRAY_FOR=speed: 'speed' is not one of 'latency', 'throughput'"),
        ({"TPRAY_RUNTIME": "gpu"}, "serve", "TPRAY_RUNTIME=gpu: there is no runtime 'gpu'"),
        ({"TPRAY_BUCKETS": "a"}, "serve", "TPRAY_BUCKETS=a: buckets are written BATCHxLENGTH"),
        ({"TPRAY_LOG": "verbose"}, "serve", "TPRAY_LOG=verbose is not a level: use one of DEBUG, INFO, WARNING, ERROR"),
        ({}, "serve --runtime cuda", "--runtime: there is no runtime 'cuda': use one of auto, cpu, neuron, neuron-xla; "
            "tpray runs on CPU cores and on AWS NeuronCores, and serves no GPUs or TPUs; see `tpray serve --help`"),
        ({}, "serve --dtype fp8", "--dtype: 'fp8' is not one of 'auto', 'float32', 'bfloat16', 'int8'; see"),
        ({}, "serve --max-queue-s -3", "--max-queue-s: input should be greater than or equal to 0; see"),
        ({}, "serve --nope", "No such option: --nope"),
        ({}, "nope", "No such command 'nope'; see `tpray --help`"),
        ({}, "rerank", "Missing argument 'query'; see `tpray rerank --help`"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_one_sentence(
    variables: dict[str, str], arguments: str, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tpray(monkeypatch, *arguments.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"tpray: {said}")
    assert printed.count("\n") == 1
    assert "Value error" not in printed


def test_without_a_command_there_is_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tpray(monkeypatch) == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS.commands)


def test_no_color_is_kept_to() -> None:
    environ = os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tpray", "status", "http://127.0.0.1:9"],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "no tpray server answers" in done.stderr
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", done.stderr)


@pytest.mark.parametrize(
    ("noted", "requirement"),
    [
        ({"url": "file:///home/a%20b/tpray", "dir_info": {"editable": True}}, "-e '/home/a b/tpray[s3]'"),
        ({"url": "file:///home/tpray", "dir_info": {}}, "'tpray[s3] @ file:///home/tpray'"),
        (
            {"url": "https://host/tpray", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "'tpray[s3] @ git+https://host/tpray@abc'",
        ),
        (None, "'tpray[s3]'"),
    ],
)
def test_an_extra_is_installed_from_where_tpray_came(
    noted: dict[str, Any] | None, requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `importlib.metadata` reads what pip notes."""
    folder = tmp_path / "tpray-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tpray\nVersion: 1\n")
    if noted is not None:
        (folder / "direct_url.json").write_text(json.dumps(noted))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert distribution("tpray").version == "1"
    assert install_command("s3") == f"{shlex.quote(sys.executable)} -m pip install {requirement}"


def test_a_missing_package_for_a_url_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://bucket/a needs another package: .* -m pip install .*\[gcs\]"):
        file_system("gs://bucket/a")
    with pytest.raises(ConfigError, match="nonsense://a cannot be opened"):
        file_system("nonsense://a")
