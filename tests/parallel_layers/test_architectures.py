"""Every architecture of the plan table, sharded unevenly too, against the stock model; ranks are threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import end_id_of, pad_id_of, rows
from tests.small_models import DECODERS, SUPPORTED, unless_distinct
from tpray.errors import CheckpointError, ConfigError, DegreeError, UnsupportedModelError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.architectures.decoders import VARIANTS
from tpray.parallel_layers.checkpoint import Checkpoint, find_checkpoint
from tpray.parallel_layers.collective import ThreadCollective
from tpray.parallel_layers.layers import is_sharded
from tpray.parallel_layers.plan import Cut, Plan, Rule, Share
from tpray.parallel_layers.shard import ShardedClassifier, build_shard
from tpray.parallel_layers.stock import empty_model


def sharded_logits(checkpoint: Checkpoint, tp: int, batch: list[np.ndarray]) -> list[torch.Tensor]:
    """Every rank's logits."""
    members = ThreadCollective.create(tp)

    def run(rank: int) -> torch.Tensor:
        with parallel_state.use(rank, tp, members[rank]), torch.no_grad():
            shard = build_shard(checkpoint, torch.float32)
            logits: torch.Tensor = shard(*map(torch.from_numpy, batch))
            return logits

    with ThreadPoolExecutor(tp) as pool:
        return list(pool.map(run, range(tp)))


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(m, "sdpa") for m in SUPPORTED]
    + [unless_distinct(pytest.mark.slow, m, "eager") if m in DECODERS else pytest.param(m, "eager") for m in SUPPORTED],
)
def test_the_logits_are_the_stock_models(model_type: str, attention: str, make_checkpoint: Callable[..., Path]) -> None:
    check_logits(make_checkpoint(model_type), attention)


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Rotary embeddings of a kind, for a model of rows of 20 that was made to take longer ones."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 20, "factor": 4.0}
    return {"rope_parameters": parameters | settings}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"multi_query": False, "alibi": True}),
        ("falcon", {"alibi": True, "parallel_attn": False}),
        ("gpt_bigcode", {"multi_query": False}),
        ("stablelm", {"qk_layernorm": True}),
        ("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}),
        ("phi3", {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 96}),
        ("mistral", {"num_key_value_heads": 1}),
        ("llama", rope("linear")),
        ("llama", rope("yarn")),
        ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
        ("phi3", rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8)),
        ("ministral3", rope("yarn", llama_4_scaling_beta=0.1)),
    ],
)
def test_so_are_those_of_its_other_forms(
    model_type: str, changes: dict[str, Any], make_checkpoint: Callable[..., Path]
) -> None:
    check_logits(make_checkpoint(model_type, **changes), "sdpa")


def test_scores_are_capped_where_the_model_caps_them(make_checkpoint: Callable[..., Path]) -> None:
    """Fused attention cannot: it is not taken, and without a cap the logits would be others."""
    directory = make_checkpoint("gemma2")
    check_logits(directory, "eager")
    capped, uncapped = find_checkpoint(directory), find_checkpoint(directory)
    uncapped.config.attn_logit_softcapping = None
    assert empty_model(capped.config).config._attn_implementation == "eager"
    batch = rows([64, 16], pad_id_of(directory))
    difference = sharded_logits(capped, 2, batch)[0] - sharded_logits(uncapped, 2, batch)[0]
    assert difference.abs().max() > 1e-3


def check_logits(directory: Path, attention: str) -> None:
    from transformers import AutoModelForSequenceClassification

    batch = rows([1, 33, 7, 64, 16], pad_id_of(directory), end_id_of(directory))
    try:
        stock: Any = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation=attention)
    except ValueError:  # this architecture has no fused attention
        stock = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        expected = ShardedClassifier(stock.eval())(*map(torch.from_numpy, batch))
    checkpoint = find_checkpoint(directory)
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    for tp in (2, 3, 4):
        for logits in sharded_logits(checkpoint, tp, batch):
            torch.testing.assert_close(logits, expected, atol=bound, rtol=0)


@pytest.mark.parametrize(
    "model_type", [unless_distinct(pytest.mark.slow, m) if m in DECODERS else m for m in SUPPORTED]
)
def test_the_shards_are_the_whole_model(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    """No sharded parameter is held twice by 2 ranks, none is lost, and most of each layer is sharded."""
    checkpoint = find_checkpoint(make_checkpoint(model_type))
    sizes = []
    for rank, tp in ((0, 1), (0, 2), (1, 2)):
        with parallel_state.use(rank, tp):
            shard = build_shard(checkpoint, torch.float32)
        assert not any(p.is_meta for p in [*shard.parameters(), *shard.buffers()])
        sizes.append({name: p.numel() for name, p in shard.named_parameters() if is_sharded(p)})
    whole, *halves = sizes
    shared = {name for name in whole if any(part in name for part in ONE_HEAD.get(model_type, ()))}
    for name in set(whole) - shared:
        assert sum(half[name] for half in halves) == whole[name], name
    for name in shared:
        assert sum(half[name] for half in halves) > whole[name]


ONE_HEAD = {"gemma": ("k_proj", "v_proj"), "falcon": ("query_key_value",), "gpt_bigcode": ("c_attn",)}
"""One key/value head for all query heads: each rank has it."""


@pytest.mark.parametrize(
    ("heads", "shared", "size"), [(12, 12, 8), (12, 12, 5), (8, 2, 8), (8, 2, 3), (16, 4, 4), (9, 3, 7), (4, 1, 3)]
)
def test_heads_are_dealt_out_whole(heads: int, shared: int, size: int) -> None:
    """Every query head to one rank, with the key/value head it uses, and a rank's groups are of one size."""
    shares = [Share.of(heads, shared, rank, size) for rank in range(size)]
    assert [head for s in shares for head in range(*s.heads)] == list(range(heads))
    for s in shares:
        own, used = range(*s.heads), range(*s.key_value_heads)
        assert own
        assert len(own) % len(used) == 0
        group, local = heads // shared, len(own) // len(used)
        assert [head // group for head in own] == [used[i // local] for i in range(len(own))]
    if heads == shared:
        assert max(len(range(*s.heads)) for s in shares) - min(len(range(*s.heads)) for s in shares) <= 1


def test_more_ranks_than_heads_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    with parallel_state.use(0, 5), pytest.raises(DegreeError, match="use 1 to 4 ranks"):
        build_shard(find_checkpoint(make_checkpoint("bert")), torch.float32)


@pytest.mark.parametrize("model_type", ["gpt2", "mistral"])
def test_a_decoder_without_a_padding_token_is_refused(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = find_checkpoint(make_checkpoint(model_type))
    checkpoint.config.pad_token_id = None
    with pytest.raises(CheckpointError, match="pad_token_id"):
        checkpoint.check_classifier()


def test_a_layer_with_a_parameter_of_its_own_needs_a_rule(make_checkpoint: Callable[..., Path]) -> None:
    """DeBERTa's q_bias belongs to a module that also has layers: it must not stay whole by accident."""
    import dataclasses

    checkpoint = find_checkpoint(make_checkpoint("deberta"))
    rules = tuple(rule for rule in checkpoint.plan.rules if "bias" not in rule.pattern)
    changed = dataclasses.replace(checkpoint, own_plan=dataclasses.replace(checkpoint.plan, rules=rules))
    with parallel_state.use(0, 2), pytest.raises(UnsupportedModelError, match="q_bias"):
        build_shard(changed, torch.float32)


def test_a_plan_survives_its_file() -> None:
    for plan in [*PLANS.values(), *(variant.plan for each in VARIANTS.values() for variant in each)]:
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "stored",
    [{}, {"rules": [["*.query", "sideways"]]}, {"rules": [["*.query"]]}, {"rules": [], "colour": 1}, {"rules": 3}],
)
def test_what_is_no_plan_is_refused_with_one_that_is(stored: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"not a sharding plan .*attention_output"):
        Plan.from_json(stored)


def test_a_rule_knows_its_cut() -> None:
    plan = Plan((Rule("*.a", Cut.UP), Rule("*", Cut.REPLICATED)))
    assert plan.is_sharded("x.a")
    assert not plan.is_sharded("x.b")
