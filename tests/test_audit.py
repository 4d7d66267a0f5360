"""The audit of dependencies says what pip-audit says, and not that all is well where nothing was looked up."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests import audit

SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI and could not be audited: a (1)"}
SOUND = {"name": "b", "version": "1", "vulns": []}
FAULTY = {
    "name": "c",
    "version": "1",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"], "aliases": ["CVE-1"], "description": ""}],
}


@pytest.mark.parametrize(
    ("packages", "accepted", "status", "words"),
    [
        ([SKIPPED], {}, 0, "SKIPPED: no database of advisories can be reached"),
        ([SOUND, SKIPPED], {}, 0, "pypi knows 1 packages, and 1 not"),
        ([SOUND, FAULTY], {}, 1, "c 1: PYSEC-1, mended in 2: raise the pin"),
        ([FAULTY], {"CVE-1": "it does not apply"}, 0, "pypi knows 1 packages"),
        (None, {}, 0, "SKIPPED"),
    ],
)
def test_the_audit_says_what_was_found(
    packages: list[Any] | None,
    accepted: dict[str, str],
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    done = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(audit, "ACCEPTED", accepted)
    assert audit.main() == status
    assert words in capsys.readouterr().out


def test_every_pin_is_asked_about_once() -> None:
    names = [line.partition("==")[0] for line in audit.pins().splitlines()]
    assert len(names) > 100
    assert len(set(names)) == len(names)
    assert all("==" in line for line in audit.pins().splitlines())
