"""What is refused before Neuron's compiler is asked, and what torch-xla would leave out unasked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpray.errors import ArtifactError, CompileError, ConfigError
from tpray.parallel_layers import collective, parallel_state
from tpray.platforms.topology import Topology
from tpray.runtime.base import SavedUserModel
from tpray.runtime.neuron import hlo
from tpray.runtime.neuron.hlo import Lowered
from tpray.runtime.neuron.xla import NeuronXlaRuntime, prepare
from tpray.runtime.records import ProgramRecord
from tpray.runtime.user_model import record_of

pytestmark = pytest.mark.xla

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
RECORD = ProgramRecord(inputs=(record_of(X),), outputs=(record_of(X),))


class Model(nn.Module):
    """``function`` of the input and a weight ``[6, 6]``."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(6, 6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def exported(function: Callable[[Tensor, Tensor], Tensor], x: Tensor = X) -> Any:
    with parallel_state.use(0, 2):
        return torch.export.export(Model(function).eval(), (x,), strict=False).module(check_guards=False)


def lowered(function: Callable[[Tensor, Tensor], Tensor], x: Tensor = X) -> tuple[Lowered, int]:
    ready, collectives = prepare(exported(function, x), 0, 2)
    with hlo.nothing_left_out():
        return hlo.lower(ready, [x]), collectives


def reduced(x: Tensor, w: Tensor) -> Tensor:
    return collective.all_reduce(x @ w)


def test_a_program_has_its_own_collectives_and_no_other_programs() -> None:
    for _ in range(3):
        program, collectives = lowered(lambda x, w: collective.all_gather(reduced(x, w), -1))
        assert collectives == 2
        assert (program.opcodes["all-reduce"], program.opcodes["all-gather"]) == (1, 1)
        assert program.groups == [(0, 1), (0, 1)]
        hlo.check(program, 2, 2, "it")


def test_a_program_whose_collectives_have_vanished_is_refused() -> None:
    """As torch-xla lowers it where its world is one process, if it is let."""
    ready, collectives = prepare(exported(reduced), 0, 2)
    with pytest.raises(CompileError, match=r"it was not compiled: its 1 collectives became 0"):
        hlo.check(hlo.lower(ready, [X]), collectives, 2, "it")


def test_a_program_over_other_ranks_is_refused() -> None:
    program, collectives = lowered(reduced)
    with pytest.raises(CompileError, match=r"over the ranks \(0, 1\), not all 4"):
        hlo.check(program, collectives, 4, "it")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.erf(x),
        lambda x, w: nn.functional.gelu(x),
        lambda x, w: nn.functional.gelu(x, approximate="tanh"),
    ],
)
def test_gelu_and_erf_are_made_of_what_the_compiler_knows(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program, _ = lowered(function)
    assert "erf" not in program.opcodes
    hlo.check(program, 0, 2, "it")


def test_what_falls_back_to_the_cpu_is_refused_by_name() -> None:
    program, _ = lowered(lambda x, w: nn.functional.unfold(x[None, None], (2, 2)))
    with pytest.raises(CompileError, match="torch-xla cannot lower aten::im2col"):
        hlo.check(program, 0, 2, "it")


def test_what_the_compiler_does_not_take_is_refused_by_name() -> None:
    program, _ = lowered(lambda x, w: torch.triangular_solve(x.t(), w)[0])
    with pytest.raises(CompileError, match="does not take HLO's triangular-solve"):
        hlo.check(program, 0, 2, "it")


def test_sizes_that_depend_on_values_are_refused() -> None:
    text = lowered(reduced)[0].text.replace("is_dynamic_dimension: false", "is_dynamic_dimension: true", 1)
    with pytest.raises(CompileError, match="takes static shapes only"):
        hlo.check(Lowered(text), 1, 2, "it")


def test_tensors_that_a_program_makes_are_where_its_inputs_are() -> None:
    """``to`` has its device among the positional arguments, as torch.export writes it."""
    program, _ = lowered(lambda x, w: x + (x > 0).to(torch.device("cpu"), torch.float32) + torch.arange(6))
    hlo.check(program, 0, 2, "it")


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_input_is_an_input_whatever_its_example(number: int) -> None:
    program, _ = lowered(lambda x, w: w * x, torch.tensor(number))
    assert program.opcodes["parameter"] == 2


def save(runtime: NeuronXlaRuntime, root: Path, rank: int, tp: int) -> Path:
    folder = root / f"rank_{rank}"
    folder.mkdir(parents=True)
    with parallel_state.use(rank, tp):
        runtime.trace_user_model(Model(reduced), [(X,)], folder)
    return folder


def test_ranks_of_one_process_load_while_it_switches_loading_off_and_on(tmp_path: Path) -> None:
    """Upstream's switch belongs to the process: what a rank opens while another has just left it would go to a core."""
    from torch_neuronx import contexts

    topology = Topology(4, "neuron-xla", layout="single-process", instance_family="trn1")
    runtimes = [NeuronXlaRuntime(topology, first_core=rank) for rank in range(4)]
    folders = [save(runtime, tmp_path, rank, 4) for rank, runtime in enumerate(runtimes)]
    assert not contexts.disabled()

    def run(rank: int) -> Tensor:
        time.sleep(0.01 * rank)
        program = runtimes[rank].load_user_model(SavedUserModel(folders[rank], rank, 4, (RECORD,), {}))
        return program(X)[0]

    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(run, range(4)):
            torch.testing.assert_close(output, 4 * (X @ torch.ones(6, 6)))


def test_when_a_rank_of_one_process_cannot_load_all_say_why(tmp_path: Path) -> None:
    topology = Topology(3, "neuron-xla", layout="single-process", instance_family="trn1")
    runtimes = [NeuronXlaRuntime(topology, first_core=rank) for rank in range(3)]
    folders = [save(runtime, tmp_path, rank, 3) for rank, runtime in enumerate(runtimes)]
    (folders[1] / "tp_1.pt").write_bytes(b"damaged")
    said = []

    def run(rank: int) -> None:
        try:
            runtimes[rank].load_user_model(SavedUserModel(folders[rank], rank, 3, (RECORD,), {}))
        except ArtifactError as e:
            said.append(str(e))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(said) == 3
    assert all("tp_1.pt is not a traced module" in words for words in said)


class Counter(nn.Module):
    """Counts its calls in place, or returns the count."""

    count: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("unread", torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.in_place:
            self.count.add_(x)
            return (self.count * 1,)
        return self.count + x, x * 2


def test_states_that_would_not_be_kept_are_refused_by_name(tmp_path: Path) -> None:
    runtime = NeuronXlaRuntime(Topology(1, "neuron-xla", instance_family="trn1"))
    example = [(torch.ones(2),)]
    with parallel_state.use(0, 1):
        with pytest.raises(ConfigError, match="changes its buffer count in place"):
            runtime.trace_user_model(Counter(True), example, tmp_path)
        with pytest.raises(ConfigError, match="never reads its state unread"):
            runtime.trace_user_model(Counter(False), example, tmp_path, aliases={"unread": 0})


def test_a_rank_that_comes_late_to_a_load_that_failed_hears_of_it(tmp_path: Path) -> None:
    topology = Topology(2, "neuron-xla", layout="single-process", instance_family="trn1")
    runtimes = [NeuronXlaRuntime(topology, first_core=rank) for rank in range(2)]
    folders = [save(runtime, tmp_path, rank, 2) for rank, runtime in enumerate(runtimes)]
    (folders[0] / "tp_0.pt").write_bytes(b"damaged")
    for rank in range(2):
        with pytest.raises(ArtifactError, match=r"tp_0\.pt is not a traced module"):
            runtimes[rank].load_user_model(SavedUserModel(folders[rank], rank, 2, (RECORD,), {}))


def test_states_are_of_one_set_of_shapes(tmp_path: Path) -> None:
    runtime = NeuronXlaRuntime(Topology(1, "neuron-xla", instance_family="trn1"))
    with parallel_state.use(0, 1), pytest.raises(ConfigError, match="for one set of shapes"):
        runtime.trace_user_model(Model(reduced), [(X,), (X[:1],)], tmp_path, aliases={"weight": 0})
