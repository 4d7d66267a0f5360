"""What the metrics of a replica say, over fake ranks: against what its clients saw, and what was done to its ranks."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.handle import DeploymentBroadcastResponse

from tests.serving.conftest import WithEngine
from tests.serving.test_access import BEARER, KEY, access
from tpray.group.fake_executor import FakeExecutor, fake_logits
from tpray.group.rank_time import RankTime, RankTotal
from tpray.group.wire import Array, Frame, Kind
from tpray.platforms.memory import memory_of
from tpray.ray_private import ask_all
from tpray.serving.dialects import DIALECTS
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.http import make_app
from tpray.serving.keys import KeyRing
from tpray.serving.load import Histogram
from tpray.serving.metrics import METRICS, MISSING, MISSING_MEANS
from tpray.serving.oip.service import GRPC
from tpray.serving.ray_metrics import RayMetrics, spread
from tpray.serving.scrape import PATH, Buckets, Others, Scrape, Snapshot, joined, rendered

README = Path(__file__).parents[2] / "README.md"
OPEN_FAMILIES: Any = openmetrics.text_string_to_metric_families
TEI, NONE = "text-embeddings-inference", "none"

Read = dict[str, dict[tuple[str, ...], float]]
"""Samples by their name and the values of their labels in the order of the labels' names, without model and replica."""


def read(text: str) -> Read:
    found: Read = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sorted(sample.labels.items()) if name not in ("model", "replica")}
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://tpray")


async def scraped(http: httpx.AsyncClient, **headers: str) -> Read:
    answer = await http.get(PATH, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(answer.text)


def holding(engine: Engine, word: str) -> Callable[[Array], bool]:
    token = engine.codec.encode([word])[0].ids[1]
    return lambda ids: bool((ids == token).any())


def test_counters_say_what_clients_saw(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        requests: list[tuple[str, str, Any]] = [
            (TEI, "/predict", {"inputs": "a b"}),
            (TEI, "/predict", {"inputs": [["a"], ["b c d"]]}),
            (TEI, "/predict/", {"inputs": ""}),
            (TEI, "/predict", {"input": "a"}),
            (TEI, "/predict", {"inputs": [["a"]] * 9}),
            ("vLLM", "/classify", {"input": ["a", "b"]}),
            ("vLLM", "/classify", {"input": ["a"], "model": "other"}),
            ("Hugging Face's inference API", "/models/org/other", {"inputs": "a"}),
            ("Open Inference Protocol", "/v2/models/other/infer", {}),
            (NONE, "/nowhere", {}),
        ]
        async with client(make_app(engine, served=("own",))) as http:
            saw = Counter[tuple[str, str, str]]()
            for dialect, path, body in requests:
                saw[dialect, "", str((await http.post(path, json=body)).status_code)] += 1
            assert (await http.get("/info")).status_code == 200
            saw[NONE, "", "200"] += 1
            said = await scraped(http)
            assert (await http.head(PATH)).text == ""
        assert said["tpray_requests_total"] == saw
        dialects = Counter[str]()
        for (dialect, _, _), count in saw.items():
            dialects[dialect] += count
        assert said["tpray_request_seconds_count"] == {(dialect,): count for dialect, count in dialects.items()}
        assert said["tpray_refusals_total"] == {("invalid",): 2, ("too_large",): 1, ("unknown_model",): 3}
        rows = engine.codec.encode(["a b", "a", "b c d", "a", "b"])
        tokens = sum(map(len, rows))
        assert said["tpray_tokens_total"] == {("",): tokens}
        assert said["tpray_step_tokens_total"][("text",)] == tokens
        assert said["tpray_rows_total"] == {(): 5}
        assert said["tpray_step_rows_sum"] == {(): 5}
        answered = {name: said[f"tpray_{name}_seconds_count"][()] for name in ("tokenize", "queue")}
        assert answered == {"tokenize": 3, "queue": 3}
        assert said["tpray_steps_total"] == said["tpray_step_seconds_count"] == {(): len(executor.steps)}
        assert said["tpray_artifact_loads_total"] in [{(source,): 1} for source in ("cache", "traced")]

    with_fake_engine(work, max_client_batch_size=8)


def test_requests_and_tokens_are_counted_by_key(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(make_app(engine, access=access("requests=4/min"))) as http:
            assert (await http.get(PATH)).status_code == 401
            for body in ({"inputs": "a b"}, {"inputs": ""}, {"inputs": "a"}):
                await http.post("/predict", json=body, headers=BEARER)
            assert (await http.post("/predict", json={"inputs": "a"})).status_code == 401
            said = await scraped(http, **BEARER)
            assert (await http.post("/predict", json={"inputs": "a"}, headers=BEARER)).status_code == 429
        tokens = sum(map(len, engine.codec.encode(["a b", "a"])))
        assert said["tpray_tokens_total"] == {("alice",): tokens, ("",): 0}
        assert said["tpray_requests_total"] == {
            (TEI, "alice", "200"): 2, (TEI, "alice", "400"): 1, (TEI, "", "401"): 1, (NONE, "", "401"): 1
        }  # fmt: skip
        assert engine.load.requests[TEI, 429, "alice"] == 1
        assert engine.load.refusals == {"unauthorized": 2, "invalid": 1, "key_limit": 1}
        async with client(make_app(engine, access=access(open_routes=("metrics",)))) as http:
            assert (await http.get(PATH)).status_code == 200
            assert (await http.get("/")).status_code == 401
            document = (await http.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"})).json()
            assert PATH in document["paths"]

    with_fake_engine(work)


def test_refusals_are_counted_by_reason(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        gate = Gate()
        async with client(make_app(engine, gate)) as http:
            executor.hang(1)
            body = {"inputs": "a"}
            waits = [http.post("/predict", json=body, headers={"x-request-timeout-seconds": "0.5"}) for _ in range(5)]
            statuses = [answer.status_code for answer in await asyncio.gather(*waits)]
            assert Counter(statuses) == {504: 4, 429: 1}
            executor.answer(1, lambda frame: Frame(Kind.RESULT, frame.step))
            await http.post("/predict", json={"inputs": "word " * 300, "truncate": False})
            await gate.close(0.0)
            assert (await http.post("/predict", json=body)).status_code == 503
        assert engine.load.refusals == {"deadline": 4, "overloaded": 1, "too_long": 1, "stopping": 1}

    with_fake_engine(work, max_concurrent_requests=4)


def test_a_row_that_raises_everywhere_halves_its_step(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.raise_on(holding(engine, "bad"), "ValueError: bad row")
        async with client(make_app(engine)) as http:
            texts = ["a", "b", "bad", "c"]
            answer = await http.post("/predict", json={"inputs": [[text] for text in texts]})
            assert answer.status_code != 200
            for _ in range(100):  # the neighbours are answered, too, though nobody waits for them
                said = await scraped(http)
                if not said["tpray_requests_in_progress"][()] - 1:
                    break
        assert said["tpray_steps_halved_total"] == {(): 2}
        assert said["tpray_refusals_total"] == {("step_failed",): 1}
        assert said["tpray_group_restarts_total"] == said["tpray_replays_total"] == {(): 0}

    with_fake_engine(work)


def test_a_request_that_is_cancelled_counts_as_one_whose_client_left(with_fake_engine: WithEngine) -> None:
    """As Serve does it when a connection closes."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(1)
        async with client(make_app(engine)) as http:
            asked = asyncio.ensure_future(http.post("/predict", json={"inputs": "a"}))
            while engine.load.tokenize_s.sum == 0:
                await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.wait([asked])
            said = await scraped(http)
        assert said["tpray_requests_total"] == {(TEI, "", "499"): 1}
        assert said["tpray_refusals_total"] == {("client_left",): 1}
        assert said["tpray_requests_in_progress"] == {(): 1}, "the scrape itself"

    with_fake_engine(work)


def test_the_dialect_is_that_of_a_route_that_classifies_let_in_or_not(with_fake_engine: WithEngine) -> None:
    """And a log line says the same."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        asked = [("GET", "/v1/models"), ("GET", "/predict"), ("POST", "/predict"), ("POST", "/nowhere")]
        door = make_app(engine, access=access())
        async with client(door) as http:
            for method, path in asked:
                for headers in ({}, BEARER):
                    await http.request(method, path, headers=headers)
        counted = {(dialect, status): n for (dialect, status, _), n in engine.load.requests.items()}
        assert counted == {
            (NONE, 401): 3, (NONE, 200): 1, (NONE, 405): 1, (NONE, 404): 1, (TEI, 401): 1, (TEI, 400): 1
        }  # fmt: skip
        scopes = [{"type": "http", "method": method, "path": path, "headers": []} for method, path in asked]
        assert [door.route_of(scope)[1] for scope in scopes] == ["", "", TEI, ""]

    with_fake_engine(work)


def test_rows_of_a_group_that_fails_are_replayed_and_a_poison_row_is_refused(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.die_of(holding(engine, "poison"))
        async with client(make_app(engine)) as http:
            texts = ("a", "b", "c d", "poison")
            asked = [http.post("/predict", json={"inputs": text}) for text in texts]
            statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
            assert statuses[:3] == [200] * 3
            await engine.group.lifecycle.until_ready()
            said = await scraped(http)
        assert said["tpray_poison_rows_total"] == {(): 1}
        assert said["tpray_refusals_total"] == {("refused_row",): 1}
        assert said["tpray_group_restarts_total"] == {(): 3}
        assert said["tpray_replays_total"][()] >= 2, "the poison row, after its first two failures"
        assert said["tpray_rows_total"] == {(): 3}, "what was done before the restarts stays counted"

    with_fake_engine(work)


def test_rows_that_are_not_finite_are_counted(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        is_bad = engine.codec.encode(["bad"])[0].ids[1]

        def answer(frame: Frame) -> Frame:
            logits = fake_logits(frame.tensors[0], frame.tensors[1])
            logits[(frame.tensors[0] == is_bad).any(axis=1), 0] = np.nan
            return Frame(Kind.RESULT, frame.step, (logits,), 1)

        executor.answer(0, answer)
        async with client(make_app(engine)) as http:
            await http.post("/predict", json={"inputs": [["fine"], ["bad"]]})
            said = await scraped(http)
        assert said["tpray_rows_not_finite_total"] == {(): 1}
        assert said["tpray_refusals_total"] == {("not_finite",): 1}

    with_fake_engine(work)


@pytest.mark.parametrize(
    ("buckets", "computed", "most"), [((), 2 * 5, 512), (((1, 8), (4, 16)), 4 * 16, 64)], ids=["any shape", "buckets"]
)
def test_padding_is_what_is_computed_beside_the_texts(
    buckets: tuple[tuple[int, int], ...], computed: int, most: int, with_fake_engine: WithEngine
) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(make_app(engine)) as http:
            await http.post("/predict", json={"inputs": [["a b"], ["a b c"]]})
            said = await scraped(http)
        lengths = [len(row) for row in engine.codec.encode(["a b", "a b c"])]
        assert lengths == [4, 5]
        assert said["tpray_step_tokens_total"] == {("text",): 9, ("padding",): computed - 9}
        assert said["tpray_step_fill_ratio_sum"][()] == pytest.approx(9 / most)

    with_fake_engine(work, buckets=buckets, max_padding=0.5)


def test_the_queue_is_what_waits(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        executor.hang(1)
        async with client(make_app(engine)) as http:
            asked = [asyncio.ensure_future(http.post("/predict", json={"inputs": "a b"})) for _ in range(5)]
            while engine.waiting()[0] < 3:  # two steps of one row are in flight
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            said = await scraped(http)
            for each in asked:
                each.cancel()
        assert said["tpray_queue_rows"] == {(): 3}
        assert said["tpray_queue_tokens"] == {(): 12}
        assert 0.1 <= said["tpray_queue_oldest_seconds"][()] < 5
        assert said["tpray_requests_in_progress"] == {(): 6}, "and the scrape itself"

    with_fake_engine(work, max_step_tokens=4)


def test_the_group_is_down_while_it_restarts_and_its_canary_has_an_age(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(make_app(engine)) as http:
            said = await scraped(http)
            assert said["tpray_group_up"] == {(): 1}
            assert 0 <= said["tpray_canary_age_seconds"][()] < 20
            assert said["tpray_canary_difference"] == {(): 0}
            phases = {phase for (phase,) in said["tpray_startup_phase_seconds"]}
            assert phases >= {"resolve", "spawn", "pin", "connect", "load", "check", "warm up", "tokenizer"}
            restart = executor.block("spawn")
            executor.die(1)
            while engine.group.lifecycle.error is None:
                await asyncio.sleep(0.01)
            assert (await scraped(http))["tpray_group_up"] == {(): 0}
            restart.set()

    with_fake_engine(work)


def test_seconds_of_a_rank_only_grow_and_show_who_is_slow(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        name = "tpray_rank_compute_seconds_total"

        def slow(frame: Frame) -> Frame:
            return Frame(Kind.RESULT, frame.step, (), 500_000)

        async with client(make_app(engine)) as http:
            executor.answer(1, slow)
            await http.post("/predict", json={"inputs": "a"})
            said = await scraped(http)
            assert said[name][("1",)] == pytest.approx(0.5)
            assert said[name][("0",)] < 0.1
            assert "tpray_rank_wait_seconds_total" not in said, "ranks of this kind do not say"
            executor.die(0)
            while not engine.restarts:
                await asyncio.sleep(0.01)
            await http.post("/predict", json={"inputs": "a"})
            assert (await scraped(http))[name][("1",)] >= 0.5

    with_fake_engine(work)


def test_the_times_of_a_rank_add_up() -> None:
    total = RankTotal()
    total.add(RankTime(3.0, None))
    assert (total.compute_s, total.wait_s) == (3.0, None)
    total.add(RankTime(3.0, 1.0))
    total.add(RankTime(1.0, 0.25))
    assert (total.compute_s, total.wait_s) == (5.75, 1.25)
    assert RankTime.together([RankTime(3.0, 1.0), RankTime(1.0, 0.25)]) == (4.0, 1.25)
    assert RankTime.together([RankTime(3.0, 1.0), RankTime(1.0, None)]) == (4.0, None)


def test_label_values_are_none_that_clients_choose(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        dialects = {dialect.name for dialect in DIALECTS} | {NONE, GRPC}
        async with client(make_app(engine, served=("own",))) as http:
            for number in range(20):
                word = f"odd-{number}"
                await http.get(f"/{word}")
                await http.post(f"/models/{word}", json={"inputs": "a"})
                await http.post(f"/v2/models/{word}/infer", json={})
                await http.post("/classify", json={"input": word, "model": word}, headers={"x-request-id": word})
                await http.request(f"X{number}", "/predict", headers={"authorization": f"Bearer {word}"})
            text = (await http.get(PATH)).text
        assert "odd" not in text
        for dialect, key, status in read(text)["tpray_requests_total"]:
            assert dialect in dialects
            assert (key, status.isdecimal()) == ("", True)

    with_fake_engine(work)


def test_what_is_declared_is_exported_and_documented(with_fake_engine: WithEngine) -> None:
    """By an engine that has seen everything that makes a sample; and Prometheus's own tools take it."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        engine.group.channel.times[0].wait_s = 0.0
        async with client(make_app(engine)) as http:
            for body in ({"inputs": "a"}, {"inputs": ""}):
                await http.post("/predict", json=body)
            text = (await http.get(PATH)).text
            open_text = await http.get(PATH, headers={"accept": "application/openmetrics-text; version=1.0.0"})
        with_samples = {family.name for family in text_string_to_metric_families(text) if family.samples}
        declared = {metric.name.removesuffix("_total") for metric in METRICS} | {MISSING}
        assert with_samples == declared
        assert open_text.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert {family.name for family in OPEN_FAMILIES(open_text.text)} == declared
        if (promtool := shutil.which("promtool")) is not None:
            done = subprocess.run(
                [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout + done.stderr) == (0, "")

    with_fake_engine(work)
    section = README.read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(tpray_\w+)(?:\{([a-z_,]+)\})?` \| (\w+) \| (.+) \|$", section, re.MULTILINE)
    rows = [(metric.name, ",".join(metric.labels), metric.kind, metric.meaning) for metric in METRICS]
    assert documented == [*rows, (MISSING, "", "gauge", MISSING_MEANS)]


def snapshot(replica: str, model: str = "own") -> Snapshot:
    samples: dict[str, Any] = {metric.name: [] for metric in METRICS}
    return Snapshot(model, replica, samples | {"tpray_rows_total": [((), 1.0)]})


def test_a_scrape_has_all_replicas_once_and_says_how_many_are_missing(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        gate = Gate()
        scrape = Scrape(engine, gate, KeyRing(), "own", "me", others)
        async with client(make_app(engine, gate, scrape=scrape)) as http:
            text = (await http.get(PATH)).text
        (family,) = (each for each in text_string_to_metric_families(text) if each.name == "tpray_rows")
        assert [sample.labels["replica"] for sample in family.samples] == ["a", "b", "me"]
        assert f'{MISSING}{{model="own",replica="me"}} 2.0' in text

    async def others() -> Others:
        return Others([snapshot("b"), snapshot("a"), snapshot("me")], 2)

    with_fake_engine(work)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_texts_of_several_models_are_one_that_is_valid(accept: str) -> None:
    texts = [
        rendered([snapshot("a", model)], [((model, "a"), 0.0)], accept)[0].decode()
        for model in ("one", 'tw"o\n# HELP x y')
    ]
    text = joined(texts, ["thr\\ee"])
    parse = OPEN_FAMILIES if accept else text_string_to_metric_families
    families = {family.name: family for family in parse(text)}
    assert [each.labels["model"] for each in families["tpray_rows"].samples] == ["one", 'tw"o\n# HELP x y']
    missing = {sample.labels["model"]: sample.value for sample in families[MISSING].samples}
    assert missing == {"one": 0, 'tw"o\n# HELP x y': 0, "thr\\ee": 1}


@pytest.mark.parametrize("seed", range(20))
def test_values_that_are_told_to_ray_fill_the_same_buckets_with_the_same_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bounds = (0.001, 0.01, 0.1, 1.0, 60.0)
    seen, told = Histogram(bounds), Histogram(bounds)
    for value in np.exp(rng.normal(-3, 2 if seed % 2 else 0.5, rng.integers(1, 50))):
        seen.add(float(value))
    for value, count in spread(bounds, seen.counts, seen.sum):
        for _ in range(count):
            told.add(value)
    assert told.counts == seen.counts
    assert told.sum == pytest.approx(seen.sum)


class OfRay:
    """Takes what Ray's metrics do."""

    def __init__(self) -> None:
        self.value, self.seen = 0.0, Histogram((1.0, 2.0))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.value += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.value = value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.seen.add(value)


def test_ray_is_told_what_has_changed() -> None:
    made: dict[str, OfRay] = {}

    async def nothing() -> Snapshot:
        return snapshot("a")

    told = RayMetrics(nothing, lambda metric: made.setdefault(metric.name, OfRay()))
    for rows, depth in ((2.0, 5.0), (7.0, 3.0), (7.0, 4.0)):
        samples = snapshot("a").samples | {
            "tpray_rows_total": [((), rows)],
            "tpray_queue_rows": [((), depth)],
            "tpray_step_rows": [((), Buckets((0, int(rows), 0, 0, 0, 0, 0, 0, 0, 0), 2 * rows))],
        }
        told.tell(Snapshot("own", "a", samples))
        assert (made["tpray_rows_total"].value, made["tpray_queue_rows"].value) == (rows, depth)
        assert (made["tpray_step_rows"].seen.counts, made["tpray_step_rows"].seen.sum) == ([0, rows, 0], 2 * rows)


def test_memory_is_that_of_a_process() -> None:
    own = memory_of(os.getpid())
    assert own is not None
    assert own > 2**20
    assert memory_of(2**22 + 1) is None, "there is none"


def test_a_replica_that_is_late_or_gone_takes_nothing_from_the_others() -> None:
    """With what Ray's own answer to a broadcast has."""

    class OfOne:
        def __init__(self, answer: Any) -> None:
            self._answer = answer

        async def get_async(self) -> Any:
            if self._answer is None:
                await asyncio.Event().wait()
            if isinstance(self._answer, Exception):
                raise self._answer
            return self._answer

    async def of_each() -> list[OfOne]:
        return [OfOne("a"), OfOne(None), OfOne(RuntimeError("it died")), OfOne("b")]

    assert inspect.iscoroutinefunction(DeploymentBroadcastResponse._fetch_replica_results_async)
    handle = SimpleNamespace(broadcast=lambda method: SimpleNamespace(_fetch_replica_results_async=of_each))
    assert asyncio.run(ask_all(handle, "snapshot", 0.2)) == (["a", "b"], 2)


def test_replicas_are_waited_for_no_longer_than_whoever_asked() -> None:
    ended = []

    class Late:
        async def get_async(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(self)

    async def of_each() -> list[Late]:
        return [Late(), Late()]

    async def work() -> None:
        handle = SimpleNamespace(broadcast=lambda method: SimpleNamespace(_fetch_replica_results_async=of_each))
        asking = asyncio.ensure_future(ask_all(handle, "snapshot", 60))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(0)
        assert len(ended) == 2

    asyncio.run(work())


def test_what_another_version_measures_otherwise_is_left_out() -> None:
    """During an upgrade a scrape has replicas of both."""
    samples: dict[str, Any] = {
        "tpray_rows_total": [(("more",), 1.0)],
        "tpray_queue_rows": [((), 2.0)],
        "tpray_step_seconds": [((), Buckets((1, 2), 1.0))],
        "tpray_that_comes_later": [((), 1.0)],
    }
    said = read(rendered([Snapshot("m", "r", samples)], [], "")[0].decode())
    assert said == {"tpray_queue_rows": {(): 2}}
