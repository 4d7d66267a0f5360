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
from tpray.errors import CheckpointError, ConfigError, DegreeError, UnsupportedModelError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.checkpoint import Checkpoint, find_checkpoint
from tpray.parallel_layers.collective import ThreadCollective
from tpray.parallel_layers.layers import is_sharded
from tpray.parallel_layers.plan import Cut, Plan, Rule, Share
from tpray.parallel_layers.shard import ShardedClassifier, build_shard


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", PLANS)
def test_the_logits_are_the_stock_models(model_type: str, attention: str, make_checkpoint: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    directory = make_checkpoint(model_type)
    batch = rows([1, 33, 7, 64, 16], pad_id_of(directory), end_id_of(directory))
    try:
        stock: Any = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation=attention)
    except ValueError:
        pytest.skip("this architecture has no fused attention")
    with torch.no_grad():
        expected = ShardedClassifier(stock.eval())(*map(torch.from_numpy, batch))
    checkpoint = find_checkpoint(directory)
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    for tp in (2, 3, 4):
        for logits in sharded_logits(checkpoint, tp, batch):
            torch.testing.assert_close(logits, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("model_type", PLANS)
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
    shared = {n for n in whole if model_type == "gemma" and any(part in n for part in ("k_proj", "v_proj"))}
    for name in set(whole) - shared:
        assert sum(half[name] for half in halves) == whole[name], name
    for name in shared:  # one key/value head for all query heads: each rank has it
        assert [half[name] for half in halves] == [whole[name]] * 2


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


def test_a_decoder_without_a_padding_token_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = find_checkpoint(make_checkpoint("gpt2"))
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
    for plan in PLANS.values():
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
