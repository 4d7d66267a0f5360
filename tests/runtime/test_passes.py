"""Each pass on a small graph: which operators were there before, and which after; and the result stays the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import RowParallelLinear
from tpray.platforms.cpu import native_dtypes
from tpray.runtime.cpu import passes
from tpray.runtime.cpu.bands import plain_copy
from tpray.runtime.cpu.int8 import Int8Weight, int8_linear, mark_int8, quantise, quantise_linears
from tpray.runtime.cpu.lowered import load_graphs, save_graphs


def exported(module: nn.Module, *inputs: Tensor) -> GraphModule:
    with torch.no_grad():
        found: GraphModule = torch.export.export(module.eval(), inputs).module(check_guards=False)
    return found


def operators(module: GraphModule) -> Counter[str]:
    """How often the graph calls each operator, by its name without its overload."""
    names = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] if name.count(".") > 1 else name.split(".")[0] for name in names)


def run(module: GraphModule, *inputs: Tensor) -> Tensor:
    """What a rank would compute, that loads the graph from its files."""
    with TemporaryDirectory() as folder, torch.inference_mode():
        save_graphs([(module, plain_copy(module))], Path(folder))
        ((function,), _) = load_graphs(Path(folder))
        found = function.run(*inputs)
        result: Tensor = found[0] if isinstance(found, list) else found
    return result


class Block(nn.Module):
    """Three projections of one input, their sum through an activation, and a residual."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.dropout(self.q(x) * self.k(x) + self.v(x), 0.1, self.training)
        result: Tensor = self.out(self.activation(self.out(mixed)))
        return result + x


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 7, 32)


def test_no_ops_are_removed(x: Tensor) -> None:
    class Idle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            unused = x * 3  # noqa: F841  # the dead node that the pass is to drop
            return F.dropout(x, 0.1, False) + x[:, :, :]

    module = exported(Idle(), x)
    expected = run(module, x)
    assert operators(module)["dropout"] == 1
    assert passes.remove_no_ops(module) >= 2
    assert set(operators(module)) == {"add"}
    torch.testing.assert_close(run(module, x), expected, rtol=0, atol=0)


def test_siblings_become_one_linear(x: Tensor) -> None:
    module = exported(Block(F.gelu), x)
    expected = run(module, x)
    assert operators(module)["linear"] == 5
    assert passes.merge_sibling_linears(module) == 1
    assert operators(module)["linear"] == 3
    assert operators(module)["split_with_sizes"] == 1
    torch.testing.assert_close(run(module, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_additions_move_before_the_all_reduce_on_rank_0_alone(rank: int, x: Tensor) -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = RowParallelLinear(64, 32, bias=True, input_is_parallel=True)
            assert self.dense.bias is not None
            nn.init.normal_(self.dense.bias)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            result: Tensor = self.dense(x.to(x.dtype)).to(x.dtype) + residual
            return result

    with parallel_state.use(rank, 2):
        module = exported(Row(), x, x)
    assert passes.remove_no_ops(module) >= 2
    before = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert before.index(passes.tpray_ops.all_reduce.default) < before.index(passes.aten.add.Tensor)
    assert passes.add_before_reducing(module, rank) == 1
    after = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert after[-1] is passes.tpray_ops.all_reduce.default
    assert after.count(passes.aten.add.Tensor) == (1 if rank == 0 else 0)
    linear = passes.nodes_calling(module, passes.aten.linear.default)[0]
    assert len(linear.args) == (3 if rank == 0 else 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linears_are_packed_with_their_activation_and_residual(name: str, x: Tensor) -> None:
    module = exported(Block(ACTIVATIONS[name]), x)
    expected = run(module, x)
    assert passes.use_onednn(module) == 5
    assert operators(module)["linear"] == 0
    assert operators(module)["_linear_pointwise"] == 5
    assert passes.fuse_activations(module) == 1
    assert not {"gelu", "silu"} & set(operators(module))
    adds = operators(module)["add"]
    assert passes.fuse_residuals(module) >= 1
    assert operators(module)["add"] < adds
    torch.testing.assert_close(run(module, x), expected, rtol=1e-5, atol=1e-5)


def test_a_relu_stays_for_onednns_hides_what_is_not_finite(x: Tensor) -> None:
    x[0, 0, 0] = torch.nan
    module = exported(Block(F.relu), x)
    passes.use_onednn(module)
    assert passes.fuse_activations(module) == 0
    assert run(module, x)[0, 0].isnan().all()


def test_an_activation_of_a_shared_output_is_not_fused(x: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.dense(x)
            result: Tensor = F.gelu(y) * y
            return result

    module = exported(Shared(), x)
    expected = run(module, x)
    passes.use_onednn(module)
    assert passes.fuse_activations(module) == 0
    torch.testing.assert_close(run(module, x), expected, rtol=1e-5, atol=1e-5)


class Added(nn.Module):
    """A linear layer of ``dtype``, and ``add`` behind it."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dense, self.add, self.dtype = nn.Linear(32, 32, bias=False, dtype=dtype), add, dtype
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(tpray_sum(self.dense(x.to(self.dtype))), self.bias) + x.exp() * x.exp()


def tpray_sum(x: Tensor) -> Tensor:
    total: Tensor = passes.tpray_ops.all_reduce(x)
    return total


@pytest.mark.parametrize(
    ("add", "dtype"),
    [
        (lambda y, bias: torch.add(y, bias, alpha=3), torch.float32),
        (lambda y, bias: bias - y, torch.float32),
        (lambda y, bias: y + bias.reshape(32, 1)[:7], torch.float32),
        (lambda y, bias: y + bias, torch.float64),  # oneDNN has no such product
        (lambda y, bias: y + bias, torch.bfloat16),  # whose sum is a float32
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_addition_that_is_no_bias_stays_where_it_is(
    add: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, rank: int, x: Tensor
) -> None:
    with parallel_state.use(rank, 2):
        module = exported(Added(add, dtype), x)
    assert passes.add_before_reducing(module, rank) == 0
    assert passes.fold_biases(module) == 0
    assert passes.use_onednn(module) == (dtype is not torch.float64)
    assert passes.fuse_residuals(module) == 0


def test_a_scaled_or_widening_residual_is_not_fused(x: Tensor) -> None:
    module = exported(Added(lambda y, bias: torch.add(y, y.exp(), alpha=2) + bias.double()), x)
    passes.use_onednn(module)
    assert passes.fuse_residuals(module) == 0


def test_dropout_that_is_on_stays() -> None:
    class Training(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, True)

    module = exported(Training(), torch.ones(3))
    passes.remove_no_ops(module)
    assert operators(module)["dropout"] == 1


def test_a_mask_is_converted_once_for_all_layers(x: Tensor) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            heads = x[:, None]
            allowed = (mask != 0)[:, None, None, :]
            once = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=allowed)
            return F.scaled_dot_product_attention(once, heads, heads, attn_mask=allowed)

    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[2, 4:] = 0
    module = exported(Twice(), x, mask)
    expected = run(module, x, mask)
    assert passes.convert_masks(module) == 1
    converted = passes.nodes_calling(module, passes.additive_mask)
    assert len(converted) == 1
    assert len(converted[0].users) == 2
    torch.testing.assert_close(run(module, x, mask), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(len(native_dtypes()) < 3, reason="this CPU has no VNNI or bfloat16")
def test_chosen_linears_are_quantised_and_the_others_are_not(x: Tensor) -> None:
    inputs: Any = x.bfloat16()
    module = exported(Block(F.gelu).bfloat16(), inputs)
    expected = run(module, inputs).float()
    assert mark_int8(module, lambda path: path in "qkv") == 3
    assert passes.merge_sibling_linears(module) == 1
    assert quantise_linears(module) == 1
    assert len(passes.nodes_calling(module, int8_linear)) == 1
    assert operators(module)["linear"] == 2
    difference = (run(module, inputs).float() - expected).abs().max() / expected.abs().max()
    assert difference < 0.03


@pytest.mark.skipif(len(native_dtypes()) < 3, reason="this CPU has no VNNI or bfloat16")
def test_a_token_in_int8_does_not_depend_on_its_neighbours(x: Tensor) -> None:
    weight = Int8Weight.of(torch.randn(16, 32))
    tokens = x.bfloat16()
    tokens[0, 0] *= 1000
    together = int8_linear(tokens, weight)
    for i in range(len(tokens)):
        torch.testing.assert_close(int8_linear(tokens[i : i + 1], weight)[0], together[i], rtol=0, atol=0)


def test_quantised_weights_are_within_half_a_step() -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 16) * torch.logspace(-4, 2, 8)[:, None]
    weight[3] = 0
    values, scales = quantise(weight)
    assert values.dtype is torch.int8
    error = (values * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] / 2 * 1.001).all()
