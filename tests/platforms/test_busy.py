"""The runtime's words for busy cores are known, and others are not taken for them."""

from __future__ import annotations

import pytest

from tpray.platforms.busy import is_busy

REFUSED = (
    "NRT:nrt_allocate_neuron_cores  Logical Neuron Core(s) not available - Requested:lnc0-lnc0 Available:0 "
    "Logical Core size:2 (cores busy, ret=-16)"
)


@pytest.mark.parametrize(
    "text",
    [
        REFUSED,
        "NeuronCore(s) not available - Requested:nc1-nc1 Available:0",
        "The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged to your system logs.",
        "NRT_FAILURE in nrt_init()",
        "Check failed: status == NRT_SUCCESS NEURONPOC : nrt_init failed. Status = 1",
        'nrt_execute status=1005 message="Neuron core is locked"',
    ],
)
def test_the_runtimes_words_for_busy_cores_are_known(text: str) -> None:
    assert is_busy(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "NRT_RESOURCE in nrt_tensor_allocate",  # no memory, which does not pass
        "nrt_load_collectives status=2",
        "No module named 'torch_neuronx'",
        "status=10050",
    ],
)
def test_other_failures_are_not(text: str) -> None:
    assert not is_busy(RuntimeError(text))


def test_a_refusal_that_another_error_was_made_of_is_known() -> None:
    error = ValueError("the program cannot be loaded")
    assert not is_busy(error)
    error.__cause__ = RuntimeError(REFUSED)
    assert is_busy(error)
