"""Requests that schemathesis makes up from the server's own OpenAPI document: answers are of a kind that it names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.faults.test_hostile_input import Server, start_server

__all__ = ["start_server"]  # a fixture

NOT_PROMISED = "not_a_server_error,positive_data_acceptance,unsupported_method,allow_header_conformance"
"""Checks that are not made: a deadline of nothing is answered with 504, an empty text is refused, and `/` is a page
too, which is not in the document: GET is answered there, and Allow names it beside POST."""


@pytest.mark.slow
def test_every_route_answers_as_its_schema_says(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """What is no text, what no client of ours sends, in each header and body: no status but those that are named.

    Statuses, headers, forms of answers; and what the document forbids is refused.
    """
    server = start_server()
    document = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", document, "--exclude-checks", NOT_PROMISED,
        "--max-examples", "50", "--seed", "1", "--request-timeout", "30",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    paths = httpx.get(document).json()["paths"]
    assert f"Tested: {sum(map(len, paths.values()))}" in done.stdout
