"""Requests that schemathesis makes up from the server's own OpenAPI schema: every answer is of a kind that it names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.faults.test_hostile_input import Server, start_server

__all__ = ["start_server"]  # a fixture

CHECKS = ",".join(
    f"{what}_conformance" for what in ("status_code", "content_type", "response_headers", "response_schema")
)
"""Not those of data: a number for a Boolean is taken, as pydantic takes it, and an empty text is refused."""


@pytest.mark.slow
def test_every_route_answers_as_its_schema_says(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """What is no text, what no client of ours sends, in each header and body: no status but those that are named."""
    server = start_server()
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"http://127.0.0.1:{server.port}/openapi.json",
        "--checks", CHECKS, "--max-examples", "100", "--seed", "1", "--request-timeout", "30",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    paths = httpx.get(f"http://127.0.0.1:{server.port}/openapi.json").json()["paths"]
    assert f"Tested: {sum(map(len, paths.values()))}" in done.stdout
