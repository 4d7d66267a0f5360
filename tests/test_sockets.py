"""What a Ray that `serve run` starts listens on: Ray's own choice, which the security page tells."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests import sockets
from tests.served import assert_all_gone, children_of

FILE = Path(sockets.SECURITY).parent / "deployments" / "local-cpu.yaml"


def test_the_table_has_every_start() -> None:
    rows = sockets.declared()
    assert {start for row in rows for start in row.starts} == {"serve", "load", "run"}
    assert {row.kind for row in rows} == {"tcp", "unix"}


@pytest.mark.slow
@pytest.mark.ray
def test_every_socket_of_serve_run_is_named(free_port: Callable[[], int], tmp_path: Path) -> None:
    port, file, log = free_port(), tmp_path / "local-cpu.yaml", tmp_path / "log"
    file.write_text(FILE.read_text().replace("port: 8000", f"port: {port}"))
    folder = tempfile.mkdtemp(prefix="tpray-ray-")  # with a short name: Ray's sockets are below it
    own = {"RAY_TMPDIR": folder, "TPRAY_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [Path(sys.executable).with_name("serve"), "run", str(file)],
        stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | own,
    )  # fmt: skip
    family: set[int] = set()
    try:
        give_up = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        family = children_of(process.pid)
        assert sockets.undeclared(process.pid, "run", http_options=port) == []
        assert any(each.address == "all" for each in sockets.listening(process.pid)), "or the page warns of nothing"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
    assert_all_gone(family, within_s=30)
