"""What the metrics of a replica say, over fake ranks: against what its clients saw."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import WithEngine
from tests.serving.test_http import client
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.engine import Engine
from tpray.serving.scrape import PATH

Read = dict[tuple[str, ...], float]
"""Samples by the values of their labels, without the model's and the replica's."""


async def scraped(http: httpx.AsyncClient) -> dict[str, Read]:
    """All samples, by the name of each."""
    answer = await http.get(PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, Read] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("replica") == "local"
            assert labels.pop("model")
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def test_counters_say_what_clients_saw(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            for body in ({"inputs": "a b"}, {"inputs": [["a"], ["b c d"]]}, {"inputs": ""}, {}):
                await http.post("/predict", json=body)
            assert (await http.get("/nowhere")).status_code == 404
            said = await scraped(http)
        tei = "text-embeddings-inference"
        asked = said["tpray_requests_total"]
        assert asked == {(tei, "", "200"): 2, (tei, "", "400"): 1, (tei, "", "422"): 1, ("none", "", "404"): 1}
        print(said)

    with_fake_engine(work)
