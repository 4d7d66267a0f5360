"""The plan table: unknown architectures and layers are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures import PLANS, plan_for
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.plan import ANY_LENGTH, Cut, Plan, Rule


def test_an_unknown_architecture_is_named_with_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'reformer'.*distilbert"):
        plan_for(AutoConfig.for_model("reformer"))


def test_a_layer_that_no_rule_mentions_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match=r"new\.layer"):
        Plan((Rule("*.query", Cut.QUERY),)).rule_for("new.layer")


def test_roberta_loses_positions_to_its_padding(make_checkpoint: Callable[..., Path]) -> None:
    config = find_checkpoint(make_checkpoint("roberta")).config
    assert plan_for(config).max_length(config) == 80 - config.pad_token_id - 1


def test_the_longest_row_is_what_the_model_computes_as_transformers_does() -> None:
    """BigBird's attention is sparse beyond some length; where positions are relative, there is no table that ends."""
    from transformers import BigBirdConfig, T5Config

    sparse = BigBirdConfig(attention_type="block_sparse", block_size=64, num_random_blocks=3)
    assert PLANS["big_bird"].max_length(sparse) == 704
    assert PLANS["big_bird"].max_length(BigBirdConfig(attention_type="original_full")) == 4096
    assert PLANS["t5"].max_length(T5Config()) == ANY_LENGTH
    assert PLANS["t5"].max_length(T5Config(n_positions=512)) == 512


def test_an_encoder_and_a_decoder_of_other_heads_are_not_cut() -> None:
    from transformers import BartConfig

    config = BartConfig(encoder_attention_heads=4, decoder_attention_heads=2)
    PLANS["bart"].check_degree(config, 1)
    with pytest.raises(UnsupportedModelError, match=r"4 attention heads in its encoder and 2 .* serve it with tp 1"):
        PLANS["bart"].check_degree(config, 2)
