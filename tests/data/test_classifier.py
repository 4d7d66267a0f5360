"""The class for ``map_batches`` without Ray: every row in its place, with what it had and its answer or error."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tpray import errors
from tpray.data import classifier as module
from tpray.data import work
from tpray.data.answers import Asking
from tpray.data.classifier import Classifier
from tpray.data.columns import check_ray_data
from tpray.data.host import GroupHost, from_here, leaving_a_cpu, settled
from tpray.errors import ConfigError, EmptyInputError, PlacementError, TprayError
from tpray.platforms.cores import core_count
from tpray.serving.local import LocalClassifier
from tpray.tokenizer import Item

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pandas")

COLUMNS = ["label", "score", "scores", "error"]


@pytest.fixture(autouse=True)
def _group(classifier: LocalClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose owner is in this process, and not in an actor."""
    host = GroupHost({})
    host._loaded = classifier

    class Here:
        def __init__(self, *_: Any) -> None:
            self.task = host.task()

        async def answer(self, items: Sequence[Item], how: Asking) -> Any:
            return host.answer(items, how)

    monkeypatch.setattr(module, "Hosted", Here)


def asked(batch: Any, **options: Any) -> Any:
    return asyncio.run(Classifier(**options)(batch))


@pytest.mark.parametrize("kind", ["numpy", "pandas", "pyarrow"])
def test_a_batch_of_each_format_keeps_its_columns(kind: str) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "text": ["a", "", "b", None], "at": [0.5, 1.5, 2.5, 3.5]})
    batch = {
        "numpy": lambda: {name: table[name].to_numpy() for name in table.column_names},
        "pandas": table.to_pandas,
        "pyarrow": lambda: table,
    }[kind]()
    made = asked(batch)
    assert made.column_names == [*table.column_names, *COLUMNS]
    assert made.select(["id", "at"]).equals(table.select(["id", "at"]))
    assert [label is None for label in made["label"].to_pylist()] == [False, True, False, True]
    assert made["scores"][0].as_py()[0] == {name: made[name][0].as_py() for name in ("label", "score")}
    assert made["error"][1].as_py() == "the text is empty: send some text"
    assert 'needs a "text"' in made["error"][3].as_py()
    assert (made.schema.field("label").type, made.schema.field("error").type) == (pa.string(), pa.string())


def test_types_are_the_same_where_nothing_can_be_classified() -> None:
    good, bad = asked(pa.table({"text": ["a"]})), asked(pa.table({"text": [""]}))
    assert good.schema == bad.schema


def test_a_block_of_nothing_has_no_columns() -> None:
    assert asked(pa.table({})).num_rows == 0


def test_paths_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    made = from_here({"model": "model", "verify_key": Path("key.pem"), "plan": {"own": 1}, "tp": 2})
    own = {"model": f"{tmp_path}/model", "verify_key": tmp_path / "key.pem", "plan": {"own": 1}, "tp": 2}
    assert made == own
    for model in ("org/model", "s3://bucket/model", None):
        assert from_here({"model": model}) == {"model": model}


def test_pairs_and_columns_that_are_there_already() -> None:
    made = asked(pa.table({"body": ["a"], "other": ["b"], "label": ["gold"]}), text_column="body", pair_column="other")
    assert made.column_names == ["body", "other", "label", *(f"tpray_{name}" for name in COLUMNS)]
    assert made["label"].to_pylist() == ["gold"]
    assert made["tpray_error"].to_pylist() == [None]


def test_an_error_fails_the_batch_if_it_is_to() -> None:
    with pytest.raises(EmptyInputError, match="a text is empty: send some text"):
        asked(pa.table({"text": ["a", ""]}), errors="raise")
    with pytest.raises(ConfigError, match="errors='ignore': it is 'column' or 'raise'"):
        asked(pa.table({"text": ["a"]}), errors="ignore")


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="the dataset has no column 'text', but id, body: name one with text_column"):
        asked(pa.table({"id": [1], "body": ["a"]}))


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"there is no option 'tpp': those of a group are .*cores, .*tp"):
        asked(pa.table({"text": ["a"]}), tpp=2)


def test_groups_share_the_cores_of_a_machine() -> None:
    assert settled({"tp": 1}, replicas=1)["cores"] == core_count()
    assert settled({"tp": 1}, replicas=core_count())["cores"] == 1
    assert settled({"tp": 2, "cores": 3}, replicas=4) == {"tp": 2, "cores": 3}


def test_ray_data_is_left_a_cpu() -> None:
    """Its tasks would wait for one for ever: so in a notebook's own Ray, which has as many as the machine."""
    two = {"tp": 2, "cores": 4}
    assert leaving_a_cpu(two, 1, cpus=9, may_shrink=True)["cores"] == 4
    assert leaving_a_cpu(two, 1, cpus=8, may_shrink=True)["cores"] == 3
    assert leaving_a_cpu(two, 2, cpus=8, may_shrink=True)["cores"] == 4, "these wait for another node, and say so"
    for options, replicas, may_shrink in ((two, 1, False), ({"tp": 2, "cores": 1}, 4, True)):
        with pytest.raises(ConfigError, match=r"8 of the 8 CPUs .* want one each: .* as in ray\.init\(num_cpus=12\)"):
            leaving_a_cpu(options, replicas, cpus=8, may_shrink=may_shrink)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"Ray Data needs pandas: .* -m pip install .*\[data\]"):
        check_ray_data()


def test_threads_that_ask_for_more_than_the_queue_takes_wait(classifier: LocalClassifier) -> None:
    """The queue takes 512 texts, and each of these is under way with as many."""
    texts = [f"text {number}" for number in range(600)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: len(list(classifier.classify_many(texts))), range(4)))
    assert found == [600] * 4


def test_what_a_group_raises_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise PlacementError("no room")

    monkeypatch.setattr(work, "Hosted", fail)
    row = work._Worker({}, fail, None)({"item": "a"})
    assert json.loads(row["outcome"]) == {"kind": "PlacementError", "error": "no room"}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, TprayError):
            assert str(kind("why")) == "why", "each is made of its sentence alone"
