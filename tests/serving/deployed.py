"""Serve config files, handed to `serve deploy` as users do, on a Ray that `ray start` started, with its dashboard."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.local_ray.ray_head import ray_head


class Deployed:
    """A Ray to deploy to. url: where its applications answer. metrics_url: where its agent exports its metrics."""

    def __init__(self, dashboard: str, http: int, metrics: int, folder: Path) -> None:
        self.url, self.metrics_url = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{metrics}/metrics"
        self._dashboard, self._http, self._file = dashboard, http, folder / "c.yaml"

    def send(self, stored: dict[str, Any]) -> float:
        """Hand what a config file holds to `serve deploy`; when, seconds since the epoch."""
        stored, since = copy.deepcopy(stored), time.time()
        stored["http_options"]["port"] = self._http
        self._file.write_text(yaml.safe_dump(stored))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address", self._dashboard, str(self._file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return since

    def applications(self) -> dict[str, Any]:
        """What Serve says of its applications, by name."""
        found = httpx.get(f"{self._dashboard}/api/serve/applications/", timeout=30).json()["applications"]
        return dict(found)

    def said(self) -> str:
        """The messages of applications and deployments, as `serve status` shows them."""
        parts = [part for app in self.applications().values() for part in (app, *app["deployments"].values())]
        return "\n".join(part["message"] for part in parts if part["message"])

    def wait_for(self, status: str, names: list[str], since: float, limit_s: float = 120.0) -> None:
        """Until all these applications, deployed ``since``, have a status."""
        give_up = time.monotonic() + limit_s
        while True:
            found = {name: app for name, app in self.applications().items() if name in names}
            states = {app["status"] for app in found.values() if app["last_deployed_time_s"] >= since}
            if len(found) == len(names) and states == {status}:
                return
            assert status == "DEPLOY_FAILED" or "DEPLOY_FAILED" not in states, self.said()
            assert time.monotonic() < give_up, found
            time.sleep(0.2)

    def __call__(self, stored: dict[str, Any], status: str = "RUNNING") -> str:
        """`send`, and wait until its applications have a status; the URL."""
        self.wait_for(status, [app["name"] for app in stored["applications"]], self.send(stored))
        return self.url


@contextmanager
def deployed(folder: Path, free_port: Callable[[], int], cpus: int, **environ: str) -> Iterator[Deployed]:
    """A Ray of ``cpus`` CPUs within the block."""
    gcs, dashboard, agent, metrics, http = (free_port() for _ in range(5))
    arguments = ["--include-dashboard=true", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    arguments.append(f"--metrics-export-port={metrics}")
    with ray_head(gcs, cpus, *arguments, **environ, TPRAY_CACHE=str(folder / "cache")):
        yield Deployed(f"http://127.0.0.1:{dashboard}", http, metrics, folder)
