"""The plan table: unknown architectures and layers are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures import plan_for
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.plan import Cut, Plan, Rule


def test_an_unknown_architecture_is_named_with_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t5'.*distilbert"):
        plan_for("t5")


def test_a_layer_that_no_rule_mentions_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match=r"new\.layer"):
        Plan((Rule("*.query", Cut.QUERY),)).rule_for("new.layer")


def test_roberta_loses_positions_to_its_padding(make_checkpoint: Callable[..., Path]) -> None:
    config = find_checkpoint(make_checkpoint("roberta")).config
    assert plan_for("roberta").max_length(config) == 80 - config.pad_token_id - 1
