"""Work on daemon threads: its result and its error arrive, and a process that ends does not wait for it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tpray.group.daemon import on_daemon_thread


def test_results_and_errors_arrive() -> None:
    assert on_daemon_thread(lambda: 5, "tpray-test").result(10) == 5
    with pytest.raises(ZeroDivisionError):
        on_daemon_thread(lambda: 1 // 0, "tpray-test").result(10)


def test_a_process_that_ends_does_not_wait() -> None:
    code = (
        "import time\nfrom tpray.group.daemon import on_daemon_thread\non_daemon_thread(lambda: time.sleep(600), 'x')\n"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert time.monotonic() - started < 300
