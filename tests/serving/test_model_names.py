"""Served model names: who may ask for what, and what the answers say."""

from __future__ import annotations

import httpx
import pytest

from tests.serving.conftest import WithEngine
from tpray.commands.flags import names_of
from tpray.config import ServeConfig
from tpray.errors import ConfigError
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.engine import Engine
from tpray.serving.http import make_app

BODY = {"query": "a", "documents": ["b"]}


def client(engine: Engine, *served: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(engine, served=served), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://tpray")


def test_another_model_than_the_served_ones_is_refused(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, "mine", "yours") as http:
            answer = await http.post("/v1/rerank", json=BODY | {"model": "other"})
            assert answer.status_code == 404
            assert answer.json()["message"] == "the model `other` does not exist here: ask for `mine` or `yours`"
            for asked in ({}, {"model": None}, {"model": ""}, {"model": "default/not-specified"}, {"model": "yours"}):
                answer = await http.post("/v1/rerank", json=BODY | asked)
                assert (answer.status_code, answer.json()["model"]) == (200, "mine"), asked

    with_fake_engine(work)


def test_a_path_may_name_the_model(with_fake_engine: WithEngine) -> None:
    """Hugging Face's, whose error it is then."""

    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine, "mine", "org/yours") as http:
            for path, status in (
                ("/", 200),
                ("/models/mine", 200),
                ("/models/org/yours/", 200),
                ("/models/yours", 404),
            ):
                answer = await http.post(path, json={"inputs": "a"})
                assert answer.status_code == status, path
            words = "the model `yours` does not exist here: ask for `mine` or `org/yours`"
            assert answer.json() == {"error": words}

    with_fake_engine(work)


def test_without_served_names_any_will_do(with_fake_engine: WithEngine) -> None:
    async def work(engine: Engine, executor: FakeExecutor) -> None:
        async with client(engine) as http:
            answer = await http.post("/v1/rerank", json=BODY | {"model": "rerank-v3.5"})
            assert (answer.status_code, answer.json()["model"]) == (200, engine.codec.record.source)

    with_fake_engine(work)


def test_names_come_from_the_flag_and_from_files() -> None:
    assert names_of(None) == ()
    assert names_of("mine, org/yours") == ("mine", "org/yours")
    assert ServeConfig.model_validate({"served_model_name": ["mine"]}).served_model_name == ("mine",)
    with pytest.raises(ConfigError, match="--served-model-name 'mine,' has an empty name"):
        names_of("mine,")
    with pytest.raises(ValueError, match="there is an empty name"):
        ServeConfig(served_model_name=(" ",))
