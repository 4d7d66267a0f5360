"""A real server under Prometheus, and traffic that has something of everything that the dashboard shows."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import httpx

from tests.monitoring.prometheus import Prometheus, scraping
from tests.served import Running, start

KEYS = {"shop": "shop-0123456789", "reports": "reports-0123456789", "prometheus": "prometheus-0123456789"}
"""By their names; each client has its own."""


@dataclass(frozen=True)
class Scene:
    server: Running
    prometheus: Prometheus

    def post(self, name: str, inputs: list[list[str]]) -> int:
        """The status of a request for several texts, with the key of this name."""
        return self.server.predict({"inputs": inputs}, headers=_shown(name)).status_code

    def traffic(self, seconds: float, in_burst: Callable[[float], bool] = lambda share: share > 0.5) -> None:
        """Requests of two keys for a while, some of them without one or without texts.

        Args:
            in_burst: whether more comes than the queue takes, at a share of the time.
        """
        began, dice = time.monotonic(), random.Random(7)

        def share() -> float:
            return (time.monotonic() - began) / seconds

        def client(name: str, rows: int, words: int, bursts: bool) -> None:
            while share() < 1:
                if bursts and not in_burst(share()):
                    time.sleep(0.1)
                    continue
                text = ["more words " * dice.randint(1, words), "a second text"]
                if self.post(name, [text] * dice.randint(1, rows)) == 429:
                    time.sleep(0.2)
                time.sleep(0 if bursts else dice.random() / 10)

        work = [("shop", 1, 3, False)] * 3 + [("reports", 16, 30, False)] + [("reports", 16, 30, True)] * 6
        clients = [threading.Thread(target=client, args=each) for each in work]
        for each in clients:
            each.start()
        while share() < 1:
            self.server.predict({"inputs": [["a", "b"]]})
            self.post("shop", [])
            time.sleep(0.5)
        for each in clients:
            each.join()

    def restart(self) -> None:
        """Kill a rank, and wait until Prometheus has seen the group come back."""
        restarts = "sum(tpray_group_restarts_total) + 0 * sum(tpray_group_up == 1)"
        before = self._wait(restarts, lambda value: True)
        info = httpx.get(f"{self.server.url}/info", headers=_shown("shop"), timeout=60).json()
        os.kill(info["ranks"][1]["pid"], signal.SIGKILL)
        self._wait(restarts, lambda value: value > before)

    def _wait(self, query: str, enough: Callable[[float], bool]) -> float:
        give_up = time.monotonic() + 120
        while True:
            found = self.prometheus.value(query)
            if found and enough(value := float(found[0]["value"][1])):
                return value
            assert time.monotonic() < give_up, (query, found)
            time.sleep(0.2)


def _shown(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


@contextmanager
def scene(folder: Path, port: int, prometheus_port: int, every_s: int = 1) -> Iterator[Scene]:
    """The demo on two ranks, with a short queue and keys, at these ports of loopback. every_s: between scrapes."""
    file = folder / "keys"
    file.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    settings = {
        "--tp": "2", "--dtype": "float32", "--served-model-name": "paraphrases", "--max-concurrent-requests": "24",
        "--api-keys": str(file),
    }  # fmt: skip
    server = start(port, folder, *chain.from_iterable(settings.items()))
    try:
        with scraping(f"127.0.0.1:{port}", prometheus_port, folder, every_s, KEYS["prometheus"]) as prometheus:
            yield Scene(server, prometheus)
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
