"""Patterns of many small operators become one call, which computes the same; what only looks like one stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.test_passes import exported, operators, run
from tpray.runtime.cpu import fusions
from tpray.runtime.cpu.passes import remove_no_ops

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


class Norm(nn.Module):
    """transformers' RMS norms: Llama's, which narrows before the weight; Gemma's, behind it; and one without."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.rand(32).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.kind == "llama":
            return self.weight * scaled.to(x.dtype)
        if self.kind == "gemma":
            return (scaled * (1.0 + self.weight.float())).to(x.dtype)
        return scaled.to(x.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "gemma", "bare"])
def test_an_rms_norm_is_one_call(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 32).to(dtype)
    module = exported(Norm(kind, dtype), x)
    expected = run(module, x)
    kept = x.clone()
    assert fusions.fuse_rms_norms(module) == 1
    assert not {"pow", "mean", "rsqrt"} & set(operators(module))
    torch.testing.assert_close(run(module, x), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(x, kept), "what a layer was given is not written to"


@pytest.mark.parametrize(
    "almost",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6),
        lambda x: x.flip(0) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
)
def test_what_is_almost_an_rms_norm_stays(almost: Callable[[Tensor], Tensor]) -> None:
    assert fusions.fuse_rms_norms(exported(Of(almost), torch.randn(4, 4, 32))) == 0


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def halves(x: Tensor, at: int = 8) -> Tensor:
    return torch.cat((-x[..., at:], x[..., :at]), dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_rotation_is_one_call(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = torch.randn(1, 1, 6, 16)
    inputs = torch.randn(2, 6, 3, 16).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.transpose(1, 2)
        return (heads * cos) + (halves(heads) * sin)

    module = exported(Of(turned), *inputs)
    expected = run(module, *inputs)
    remove_no_ops(module)
    assert fusions.fuse_rotations(module) == 1
    assert not {"cat", "neg"} & set(operators(module))
    torch.testing.assert_close(run(module, *inputs), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "almost",
    [
        lambda x, c, s: x * c - halves(x) * s,
        lambda x, c, s: x * c + halves(x, 4) * s,
        lambda x, c, s: x * c + halves(x + 1) * s,
        lambda x, c, s: x * c + torch.cat((x[..., 8:], x[..., :8]), dim=-1) * s,
        lambda x, c, s: x * c + torch.cat((-x[..., :8], x[..., 8:]), dim=-1) * s,
    ],
)
def test_what_is_almost_a_rotation_stays(almost: Callable[..., Tensor]) -> None:
    inputs: Any = torch.randn(2, 3, 6, 16), torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16)
    module = exported(Of(almost), *inputs)
    remove_no_ops(module)
    assert fusions.fuse_rotations(module) == 0


def gelu_written_out(x: Tensor, factor: float = 0.044715) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + factor * torch.pow(x, 3.0))))


def test_a_gelu_that_is_written_out_gets_its_name() -> None:
    x = torch.randn(4, 9)
    module = exported(Of(gelu_written_out), x)
    expected = run(module, x)
    assert fusions.name_gelus(module) == 1
    assert operators(module) == {"gelu": 1}
    torch.testing.assert_close(run(module, x), expected, atol=1e-6, rtol=1e-6)
    assert fusions.name_gelus(exported(Of(lambda x: gelu_written_out(x, 0.04)), x)) == 0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float = 0.0, scale: float = 0.25) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    return torch.matmul(torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype), v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_attention_that_is_written_out_gets_its_name(cap: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 16).to(dtype).unbind(0)
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.rand(2, 1, 7, 7) < 0.3, torch.finfo(dtype).min).to(dtype)
    module = exported(Of(lambda q, k, v, m: attention(q, k, v, m, cap)), q, k, v, mask)
    expected = run(module, q, k, v, mask)
    remove_no_ops(module)
    assert fusions.name_attentions(module) == 1
    assert not {"softmax", "matmul", "tanh"} & set(operators(module))
    torch.testing.assert_close(run(module, q, k, v, mask), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def shares_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores + mask, dim=-1), v) + scores.mean()


@pytest.mark.parametrize(
    "almost",
    [
        lambda q, k, v, m: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) + m, dim=-2), v),
        lambda q, k, v, m: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)).tanh() + m, dim=-1), v),
        lambda q, k, v, m: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)) + m[..., :4, :4], dim=-1), v),
        lambda q, k, v, m: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) + m, dim=-1) * 2, v),
        lambda q, k, v, m: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) + m[0, 0], dim=-1), v),
        shares_scores,
    ],
)
def test_what_is_almost_attention_stays(almost: Callable[..., Tensor]) -> None:
    q, k, v = torch.randn(3, 2, 4, 4, 4).unbind(0)
    module = exported(Of(almost), q, k, v, torch.zeros(2, 1, 4, 4))
    remove_no_ops(module)
    assert fusions.name_attentions(module) == 0
