"""A plan of the user's own, for an architecture that tpray's table lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpray.artifacts.resolve import find_model
from tpray.commands.plan_report import explain_plan
from tpray.config import ModelConfig
from tpray.errors import ConfigError, UnsupportedModelError
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms.topology import Topology
from tpray.serving.local import load

ROC_BERT: dict[str, Any] = {
    "rules": [
        ["*.attention.self.query", "query"],
        ["*.attention.self.key", "query"],
        ["*.attention.self.value", "query"],
        ["*.attention.output.dense", "attention_output"],
        ["*.intermediate.dense", "up"],
        ["*.layer.*.output.dense", "down"],
        ["*.word_embeddings", "vocab"],
        ["*", "replicated", "the rest is small"],
    ],
    "local": [["*.attention.self", ["num_attention_heads", "all_head_size"]]],
}


@pytest.fixture
def roc_bert(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(
        "roc_bert", pronunciation_embed_dim=16, pronunciation_vocab_size=120, shape_embed_dim=16, shape_vocab_size=120
    )


def test_a_model_outside_the_table_is_sharded_by_its_users_plan(roc_bert: Path, tmp_path: Path) -> None:
    """Start-up compares the shards with the unsharded model, so that coming up is the proof."""
    with pytest.raises(UnsupportedModelError, match=r"'roc_bert'.*--plan FILE"):
        find_model(ModelConfig(source=str(roc_bert)), Topology(2))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(ROC_BERT))
    with load(roc_bert, tp=3, dtype="float32", plan=file, executor=ThreadExecutor(3)) as classifier:
        assert classifier.group.parity < 1e-5
        artifact = classifier.group.artifact
        assert artifact.manifest.ranks[0].sharded_bytes > artifact.manifest.ranks[0].replicated_bytes


def test_the_plan_is_shown_with_bytes_and_reasons(roc_bert: Path) -> None:
    named = ModelConfig(source=str(roc_bert), plan=ROC_BERT, dtype="float32")
    lines = {line.pattern: line for line in explain_plan(named, 2).lines}
    assert lines["*.word_embeddings"].rank_bytes * 2 == lines["*.word_embeddings"].whole_bytes == 120 * 64 * 4
    assert lines["*"].why == "the rest is small"
    assert lines["*.attention.self.query"].layers == 2
    assert lines["*.layer.*.output.dense"].how == "row-parallel by features, all-reduce after"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": [["*.nowhere", "up"], *ROC_BERT["rules"]]}, r"'\*\.nowhere' matches no layer .*linear"),
        ({"local": [["*.elsewhere", ["heads"]]]}, r"'\*\.elsewhere' matches no"),
        ({"rules": ROC_BERT["rules"][:-1]}, "says nothing about the layer"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(roc_bert: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_model(ModelConfig(source=str(roc_bert), plan=ROC_BERT | change), Topology(2))
