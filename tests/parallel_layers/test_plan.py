"""The plan table: every architecture whole, degrees named, unknown ones refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tpray.errors import DegreeError, UnsupportedModelError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import resolve
from tpray.parallel_layers.layers import is_sharded
from tpray.parallel_layers.plan import PLANS, Cut, Plan, Rule, plan_for
from tpray.parallel_layers.shard import build_shard


@pytest.mark.parametrize("model_type", PLANS)
def test_attention_and_feed_forward_are_sharded(model_type: str, make_checkpoint: Callable[..., Path]) -> None:
    """Per layer q, k, v and the feed-forward's first are column-parallel, and two more are row-parallel."""
    with parallel_state.use(1, 4):
        shard = build_shard(resolve(make_checkpoint(model_type)), torch.float32)
    sharded = [name for name, p in shard.named_parameters() if is_sharded(p)]
    assert len(sharded) == 2 * (4 * 2 + 2)
    assert not any(p.is_meta for p in [*shard.parameters(), *shard.buffers()])


def test_a_degree_that_does_not_divide_is_named_with_those_that_do(make_checkpoint: Callable[..., Path]) -> None:
    config = resolve(make_checkpoint()).config
    with pytest.raises(DegreeError, match=r"tp 3 .* 1, 2, 4 ranks"):
        plan_for("bert").check_degree(config, 3)


def test_an_unknown_architecture_is_named_with_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t5'.*distilbert"):
        plan_for("t5")


def test_a_layer_that_no_rule_mentions_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match=r"new\.layer"):
        Plan((Rule("*.query", Cut.QUERY),)).rule_for("new.layer")


def test_roberta_loses_positions_to_its_padding(make_checkpoint: Callable[..., Path]) -> None:
    config = resolve(make_checkpoint("roberta")).config
    assert plan_for("roberta").max_length(config) == 80 - config.pad_token_id - 1
