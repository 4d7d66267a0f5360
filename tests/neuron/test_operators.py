"""Operators rewritten for Neuron's compiler against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tpray.runtime.neuron.operators import erf, fill, gelu

EVERYWHERE = torch.cat([torch.linspace(-8, 8, 200_001), torch.tensor([0.0, -0.0, 1e-30, 50.0, -50.0])])


def test_erf_is_near_torchs() -> None:
    assert (erf(EVERYWHERE) - torch.erf(EVERYWHERE.double())).abs().max() < 6e-7
    assert torch.equal(erf(torch.tensor([float("inf"), float("-inf")])), torch.tensor([1.0, -1.0]))
    assert erf(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_near_torchs(approximate: str) -> None:
    exact = F.gelu(EVERYWHERE.double(), approximate=approximate)
    assert ((gelu(EVERYWHERE, approximate) - exact).abs() / exact.abs().clamp(min=1)).max() < 6e-7
    narrow = EVERYWHERE.bfloat16()
    assert gelu(narrow, approximate).dtype is torch.bfloat16
    torch.testing.assert_close(gelu(narrow, approximate), F.gelu(narrow, approximate=approximate), rtol=8e-3, atol=1e-6)


def test_fill_changes_what_it_is_given() -> None:
    x = torch.arange(6).reshape(2, 3)
    fill(x[:, 0], torch.tensor(7))
    assert x.tolist() == [[7, 1, 2], [7, 4, 5]]
