"""A real Prometheus on loopback: Debian's, which `make prometheus` unpacks beside Python; or one on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

MONITORING = Path(__file__).parents[2] / "deployments" / "monitoring"
UNPACKED = Path(sys.prefix) / "prometheus" / "usr" / "bin"


def program(name: str) -> str | None:
    """Where prometheus or promtool is; None: nowhere."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), str(UNPACKED))))


PROMETHEUS, PROMTOOL = program("prometheus"), program("promtool")
MISSING = "there is no Prometheus: `make prometheus` (Debian and its kin), or install it"


@dataclass(frozen=True)
class Prometheus:
    """One that runs. url: without a slash at its end. every_s: how often it scrapes, seconds."""

    url: str
    every_s: int

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data that its HTTP API answers with.

        Raises:
            AssertionError: it answers with an error.
        """
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def value(self, query: str, at: float | None = None) -> list[dict[str, Any]]:
        """A list of {"metric": labels, "value": [time, text]}. at: when, seconds since the epoch; None: now."""
        when = {} if at is None else {"time": at}
        found: list[dict[str, Any]] = self.ask("query", query=query, **when)["result"]
        return found


@contextmanager
def scraping(target: str, port: int, folder: Path, every_s: int = 1, key: str | None = None) -> Iterator[Prometheus]:
    """The configuration of deployments/monitoring, with another target, pace and key.

    Args:
        target: host and port of a server. folder: for the data, the configuration and the log.
    """
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], f"{every_s}s")
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    if key is not None:
        (folder / "key").write_text(key)
        job["authorization"] = {"credentials_file": str(folder / "key")}
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(yaml.safe_dump(config))
    assert PROMETHEUS is not None
    command = [
        PROMETHEUS, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    found = Prometheus(f"http://127.0.0.1:{port}", every_s)
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
        try:
            give_up = time.monotonic() + 60
            while not _ready(found.url):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
