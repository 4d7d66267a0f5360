"""Plans that are derived from transformers' own: what they become, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_models import DERIVED
from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures import PLANS, plan_for
from tpray.parallel_layers.architectures.upstream import classifier_types, default_config, derive, why_not
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.plan import Cut, Share
from tpray.parallel_layers.shard import decide
from tpray.parallel_layers.stock import empty_model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma"])
def test_a_derived_plan_is_the_one_in_the_table(model_type: str) -> None:
    """Layer for layer, where there are both."""
    config = default_config(model_type)
    model, derived = empty_model(config), derive(config)
    assert derived is not None
    assert derived.reads_last_token
    ours = {decision.path: decision.rule.cut for decision in decide(model, PLANS[model_type])}
    assert {decision.path: decision.rule.cut for decision in decide(model, derived)} == ours


def test_every_plan_that_transformers_states_is_kept_and_tested() -> None:
    stated = []
    for name in classifier_types():
        config = default_config(name)
        if name not in PLANS and getattr(config, "base_model_tp_plan", None) and why_not(config) is None:
            stated.append(name)
            assert plan_for(config).shards_heads()
    assert sorted(stated) == sorted(DERIVED)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("mixtral", "'mixtral' is a mixture of experts"),
        ("jetmoe", "'jetmoe' is a mixture of experts"),
        ("deepseek_v2", "'deepseek_v2' has multi-head latent attention"),
        ("qwen3_5_text", "'qwen3_5_text' has layers with a state"),
        ("zamba2", "'zamba2' has layers with a state"),
    ],
)
def test_what_is_not_dense_attention_is_refused_by_name(model_type: str, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        plan_for(default_config(model_type))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"layers.*.self_attn.q_proj": "colwise"}, "does not split query, key, value and output"),
        ({"layers.*.mlp.up_proj": "colwise"}, "mlp.up_proj has 14336 features, which no layer takes"),
        ({"layers.*.self_attn.q_proj": "sequence_parallel"}, "q_proj is sequence_parallel, and a Linear"),
        ({"layers.*.input_layernorm": "colwise"}, "input_layernorm is colwise, and a MistralRMSNorm"),
        ({"layers.*.self_attn.k_proj": "rowwise"}, "does not split query, key, value and output"),
        ({"layers.*.attention.query": "colwise"}, "none of its patterns matches a layer"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused_with_its_pattern(plan: dict[str, str], said: str) -> None:
    config = default_config("mistral")
    config.base_model_tp_plan = plan
    with pytest.raises(UnsupportedModelError, match=f"transformers' plan for mistral cannot be kept: .*{said}"):
        plan_for(config)


def test_what_is_fused_is_not_guessed() -> None:
    """A query, key and value in one may be fused in several ways, which sizes do not tell apart."""
    with pytest.raises(UnsupportedModelError, match="qkv_proj is colwise_gather_output with 9216 features"):
        derive(default_config("phi3"))
    with pytest.raises(UnsupportedModelError, match="GPTNeoXAttention does not say how large a head is"):
        derive(default_config("gpt_neox"))


@pytest.mark.parametrize(("heads", "shared"), [(8, 8), (8, 2), (6, 1), (12, 3)])
@pytest.mark.parametrize("cut", [Cut.QKV, Cut.QKV_GROUPS])
def test_fused_layers_are_cut_between_heads(cut: Cut, heads: int, shared: int) -> None:
    """Each rank's pieces are its own query heads, and the keys and values that they use."""
    group, width = heads // shared, 5
    names = [f"q{i}" for i in range(heads)], [f"k{i}" for i in range(shared)], [f"v{i}" for i in range(shared)]
    in_groups = [[*names[0][i * group : (i + 1) * group], names[1][i], names[2][i]] for i in range(shared)]
    order = [name for each in (in_groups if cut is Cut.QKV_GROUPS else names) for name in each]
    for size in (1, 2, 3, 5):
        for rank in range(size):
            share = Share.of(heads, shared, rank, size)
            bounds = share.bounds(cut, width * len(order))
            held = [name for start, stop in bounds for name in order[start // width : stop // width]]
            assert all(edge % width == 0 for each in bounds for edge in each)
            own = {*names[0][slice(*share.heads)]} | {f"{n}{i}" for n in "kv" for i in range(*share.key_value_heads)}
            assert set(held) == own
            assert len(held) == len(own)


def test_a_norm_over_all_heads_counts_shared_heads_once() -> None:
    """The ranks' weights, each over how many hold the same, add up to one for each key/value head."""
    for heads, shared, size in ((8, 2, 8), (8, 2, 3), (12, 3, 7), (4, 4, 2)):
        held: dict[int, float] = {}
        for rank in range(size):
            share = Share.of(heads, shared, rank, size)
            for head in range(*share.key_value_heads):
                held[head] = held.get(head, 0.0) + 1 / share.holders
        assert held == pytest.approx(dict.fromkeys(range(shared), 1.0))


def test_the_readme_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from tpray.commands.cli import app

    printed = CliRunner().invoke(app, ["doctor", "--markdown"]).stdout
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "mistral" in printed
    assert printed in readme, "put the output of `tpray doctor --markdown` there"


def test_a_checkpoint_is_served_by_a_derived_plan(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint: Any = find_checkpoint(make_checkpoint("mistral"))
    checkpoint.check_classifier()
    assert {rule.cut for rule in checkpoint.plan.rules} >= {Cut.QUERY, Cut.KEY_VALUE, Cut.VOCAB, Cut.DOWN}
