"""What Neuron's compiler for XLA will be given, looked at before it is asked: it takes minutes, and errs far away.

torch-xla lowers a module to one HLO module. A collective that is missing there, or an operator that fell back to the
CPU, would be a program that gives another answer; an operator that the compiler lacks would fail it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpray.config import variable_set
from tpray.errors import CompileError

log = logging.getLogger(__name__)

_LISTED = """
abs add all-gather all-reduce atan2 batch-norm-training batch-norm-grad batch-norm-inference broadcast ceil clamp
compare concatenate constant convert
cosine custom-call divide dot dynamic-update-slice exponential floor gather get-tuple-element iota log maximum minimum
multiply negate not and pad power reduce reshape rng-bit-generator rsqrt scatter select shift-right-logical sign sine
slice sqrt subtract tanh transpose tuple
"""
_ADDED_SINCE = "reverse select-and-scatter bitcast-convert topk sort"
_SEEN = "parameter or xor convolution reduce-window exponential-minus-one log-plus-one logistic remainder dynamic-slice"
OPCODES = frozenset(f"{_LISTED} {_ADDED_SINCE} {_SEEN}".split())
"""HLO operators that the compiler takes.

Sources: aws-neuron-sdk's documentation. The first group is its list "Supported operators [XLA]", which is of the older
compiler, neuron-cc; neuronx-cc prints its own (``list-operators``), and nobody has published that. The second group
comes from neuronx-cc's release notes (2.2 to 2.6) and its error codes (EVRF013: topk, of which torch-xla makes a sort).
The last group has no source: ``parameter`` is in every program, and the others are what common operators of PyTorch
become. ``erf`` stands nowhere, and was refused (aws-neuron-sdk, issue 1081).
"""


REFUSED = frozenset({"erf", "triangular-solve"})
"""HLO operators that it does not take. Sources: aws-neuron-sdk, issue 1081 and the error codes EVRF001 and EUOC002."""


@dataclass(frozen=True)
class Lowered:
    """An HLO module as torch-xla prints it. fallbacks: operators of torch that it ran on the CPU instead."""

    text: str
    fallbacks: tuple[str, ...] = ()

    @property
    def opcodes(self) -> Counter[str]:
        """How often each operator stands in it."""
        return Counter(re.findall(r'^    opcode: "([^"]+)"', self.text, re.MULTILINE))

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Of each collective the ranks that take part."""
        found = re.findall(r"^    replica_groups \{\n((?:      replica_ids: \d+\n)*)", self.text, re.MULTILINE)
        return [tuple(int(number) for number in re.findall(r"\d+", block)) for block in found]

    @property
    def is_dynamic(self) -> bool:
        """Whether a dimension is known only when it runs."""
        return "is_dynamic_dimension: true" in self.text


def device() -> torch.device:
    """What modules are lowered on. It is torch-xla's CPU client in a process that traces."""
    return torch.device("xla", 0)


@contextmanager
def nothing_left_out() -> Iterator[None]:
    """Within the block torch-xla lowers what it would simplify elsewhere.

    It leaves out all-reduces where its own world has one process, as it has here (torch_xla/core/xla_model.py,
    ``all_reduce``); and it takes an input without dimensions, whose example is 0 or 1, for that number
    (XLA_NO_SPECIAL_SCALARS).
    """
    import torch_xla

    before = torch_xla._XLAC._get_xla_handle_special_scalars()
    torch_xla._XLAC._set_xla_handle_special_scalars(False)
    try:
        with variable_set("XLA_ALWAYS_ALLREDUCE", "1"):
            yield
    finally:
        torch_xla._XLAC._set_xla_handle_special_scalars(before)


def forget_collectives() -> None:
    """Let the next program begin anew.

    torch-xla chains the collectives of a process by a token, so that they keep their order; a program would hold, as
    what its first collective waits for, all of the program before.
    """
    import torch_xla

    torch_xla._XLAC._set_all_reduce_token(str(device()), None)


def lower(module: nn.Module, example: Sequence[Tensor]) -> Lowered:
    """The HLO of a module on the CPU for inputs like ``example``; nothing is computed. See `nothing_left_out`."""
    import torch_xla
    from torch_xla.debug import metrics

    forget_collectives()
    metrics.clear_counters()
    try:
        with torch.no_grad():
            outputs = module.to(device())(*(x.to(device()) for x in example))
    finally:
        module.to("cpu")
    fallbacks = tuple(name for name in metrics.counter_names() if name.startswith("aten::"))
    context: Any = torch_xla._XLAC.lowering.LoweringContext()
    context.build([outputs] if isinstance(outputs, Tensor) else list(outputs))
    text: str = context.hlo_text()
    forget_collectives()
    return Lowered(text, fallbacks)


def check(lowered: Lowered, collectives: int, ranks: int, what: str) -> None:
    """Refuse a program that would not compile, or would compute something else.

    Args:
        collectives: how many it must have. ranks: over how many each must go. what: the program, for the message.

    Raises:
        CompileError: what is wrong with it.
    """
    if lowered.fallbacks:
        raise CompileError(
            f"{what} was not compiled: torch-xla cannot lower {_names(lowered.fallbacks)}, and would run it on the CPU"
        )
    if lowered.is_dynamic:
        raise CompileError(
            f"{what} was not compiled: a size in it depends on values, and Neuron's compiler takes static shapes only"
        )
    opcodes = lowered.opcodes
    found = opcodes["all-reduce"] + opcodes["all-gather"]
    if found != collectives:
        raise CompileError(
            f"{what} was not compiled: its {collectives} collectives became {found} when torch-xla lowered it, and it "
            "would compute something else. It is a fault of tpray with this torch-xla: please report it"
        )
    wrong = {group for group in lowered.groups if group != tuple(range(ranks))}
    if wrong:
        raise CompileError(
            f"{what} was not compiled: a collective of it is over the ranks {min(wrong)}, not all {ranks}"
        )
    if refused := sorted(set(opcodes) & REFUSED):
        raise CompileError(f"{what} was not compiled: Neuron's compiler does not take HLO's {_names(refused)}")
    if unknown := sorted(set(opcodes) - OPCODES):
        log.warning("%s: it is not known whether Neuron's compiler takes HLO's %s", what, _names(unknown))


def _names(operators: Iterable[str]) -> str:
    return ", ".join(operators)
