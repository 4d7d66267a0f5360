"""Busy cores are tried again, within a limit, and nothing else is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from tpray.platforms.busy import BUSY_LIMIT_S, is_busy
from tpray.runtime.neuron.busy import LONGEST_PAUSE_S, retry_busy

REFUSED = (
    "NRT:nrt_allocate_neuron_cores  Logical Neuron Core(s) not available - Requested:lnc0-lnc0 Available:0 "
    "Logical Core size:2 (cores busy, ret=-16)"
)


class Clock:
    """Time that only sleeping passes."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tpray.runtime.neuron.busy.time.sleep", clock.sleep)
    monkeypatch.setattr("tpray.runtime.neuron.busy.time.monotonic", lambda: clock.now_s)
    return clock


def refuse(times: int, text: str = REFUSED) -> Callable[[], int]:
    """A call that is refused so often, and then returns how often it was made."""
    made = 0

    def call() -> int:
        nonlocal made
        made += 1
        if made <= times:
            raise RuntimeError(text)
        return made

    return call


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
def test_the_runtimes_words_for_busy_cores_are_known(text: str, clock: Clock) -> None:
    assert retry_busy(refuse(2, text)) == 3


@pytest.mark.parametrize(
    "text",
    [
        "NRT_RESOURCE in nrt_tensor_allocate",  # no memory, which does not pass
        "nrt_load_collectives status=2",
        "No module named 'torch_neuronx'",
        "status=10050",
    ],
)
def test_other_failures_are_raised_at_once(text: str, clock: Clock) -> None:
    with pytest.raises(RuntimeError, match=re.escape(text)):
        retry_busy(refuse(1, text))
    assert not clock.pauses


def test_a_refusal_that_another_error_was_made_of_is_known() -> None:
    error = ValueError("the program cannot be loaded")
    assert not is_busy(error)
    error.__cause__ = RuntimeError(REFUSED)
    assert is_busy(error)


def test_it_gives_up_at_its_limit_with_the_runtimes_own_words(clock: Clock) -> None:
    began = clock.now_s
    with pytest.raises(RuntimeError, match="ret=-16"):
        retry_busy(refuse(1000))
    assert BUSY_LIMIT_S - 1.5 * LONGEST_PAUSE_S < clock.now_s - began <= BUSY_LIMIT_S


def test_pauses_grow_up_to_a_limit_and_differ(clock: Clock) -> None:
    """Ranks that were refused together do not try again together."""
    with pytest.raises(RuntimeError):
        retry_busy(refuse(1000), limit_s=300)
    assert clock.pauses[0] < 0.5
    assert max(clock.pauses) <= 1.5 * LONGEST_PAUSE_S
    assert len(set(clock.pauses)) == len(clock.pauses)


def test_it_is_said_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        retry_busy(refuse(4))
    assert len(caplog.records) == 1
    assert "busy, and are tried again for up to 60 s" in caplog.text
