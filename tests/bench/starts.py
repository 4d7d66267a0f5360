"""How long a start takes, beside a bare Serve application: ``python -m tests.bench.starts``.

Every start is a process of its own, timed from its launch to what a user waits for: of a server the first answer over
HTTP, of ``tpray classify`` its end. The bare application answers a constant; its Ray, Serve and HAProxy have the
settings of ``tpray serve``. The ratios are of medians of one run.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from urllib.request import ProxyHandler, build_opener

from tpray.config import environment

LIMIT_S = 120.0
"""How long one start may take."""

PAIR = ("The company is based in New York City", "Its headquarters are situated in Manhattan")


def serve_bare(port: int) -> None:
    """Serve a constant on loopback, as `tpray serve` would, until this process is interrupted; prints Ready."""
    from tpray.config import set_default_variables, set_variables, stay_quiet
    from tpray.local_ray.local import start_ray, stop_ray
    from tpray.platforms.lease import SERVER_PORTS, take_ports
    from tpray.serving import haproxy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    stay_quiet()
    folder, ports = Path(tempfile.mkdtemp(prefix="tpray-bench-")), take_ports(haproxy.PORTS, SERVER_PORTS)
    set_variables(haproxy.places(folder, ports.ids, "bare", {}))
    set_default_variables(haproxy.settings(60))
    start_ray(os.cpu_count() or 1, folder, ports)
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Constant:
        async def __call__(self, request: Any) -> str:
            return "constant"

    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(cast(Any, Constant).bind(), route_prefix="/")
        print("Ready", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        stop_ray()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def start_server(command: Sequence[str], path: str, environ: dict[str, str], log: Path | None = None) -> float:
    """Seconds from the launch of a server to the first 200 of its ``path``; it is ended then.

    command: with ``{port}`` in the place of its port.

    Raises:
        RuntimeError: it does not answer.
    """
    port = _free_port()
    started = time.perf_counter()
    with open(log or os.devnull, "wb") as file:
        process = subprocess.Popen(
            [part.format(port=port) for part in command], env=environ, stdout=subprocess.PIPE, stderr=file
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(b"Ready"):
                    break
            while not _answers(f"http://127.0.0.1:{port}{path}"):
                if process.poll() is not None or time.perf_counter() - started > LIMIT_S:
                    raise RuntimeError(f"{' '.join(command)} does not answer")
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:  # its watchdog ends the rest, which would spoil the next start
                process.kill()
                process.communicate()
                raise


def run_once(command: Sequence[str], environ: dict[str, str]) -> float:
    """Seconds that a command takes from its launch to its end."""
    started = time.perf_counter()
    subprocess.run(
        command, env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=LIMIT_S
    )
    return time.perf_counter() - started


def measure(times: int = 3) -> dict[str, list[float]]:
    """Seconds of each kind of start, ``times`` each, taken in turn; each turn has an empty cache of its own."""
    python = [sys.executable, "-m"]
    bare = [*python, "tests.bench.starts", "bare", "{port}"]
    serve = [*python, "tpray", "serve", "--tp", "2", "--port", "{port}"]
    classify = [*python, "tpray", "classify", "--pair", *PAIR]
    found: dict[str, list[float]] = {}

    def note(kind: str, seconds: float) -> None:
        found.setdefault(kind, []).append(seconds)
        print(f"  {kind:<14} {seconds:6.2f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="tpray-starts-") as folder:
        for turn in range(times):
            cache = environment() | {"TPRAY_CACHE": f"{folder}/{turn}"}
            note("bare", start_server(bare, "/", cache))
            for number in ("first", "again"):
                note(f"serve {number}", start_server(serve, "/health", cache))
            for number in ("first", "again"):  # tp 1: the programs of tp 2 do not serve it
                note(f"classify {number}", run_once(classify, cache))
    return found


def main() -> None:
    if sys.argv[1:2] == ["bare"]:
        serve_bare(int(sys.argv[2]))
        return
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found = measure(times)
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    for kind, seconds in medians.items():
        print(f"{kind:<14} {seconds:6.2f} s, {seconds / medians.get('bare', seconds):.2f} of bare Serve's")


if __name__ == "__main__":
    main()
