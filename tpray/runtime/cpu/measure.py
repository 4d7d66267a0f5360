"""How fast layers of a shape run on this machine's cores, in each of some layouts: a process of its own, for a second.

``python -m tpray.runtime.cpu.measure`` reads a question as JSON from standard input and writes its answer. Who asks is
`tpray.platforms.measured`, before any group is started, and keeps the answer; null is none.

Every rank of a layout is a process on cores of its own, runs its share of two or three layers as a rank's program does
(prepacked linears, fused attention, the collective of a real group), and is forked here, so that torch is imported
once. Layouts take turns, and the shortest time of each counts, of turns in which no other process had their cores.

Legend: T tokens of a step, H hidden, own = a rank's share of H or of the feed-forward.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpray.parallel_layers.collective import Collective
from tpray.parallel_layers.rendezvous import Rendezvous, join
from tpray.runtime.base import DTYPES
from tpray.runtime.cpu.huge_pages import use_huge_pages
from tpray.runtime.cpu.lowered import pack

LAYERS_BYTES = 192 << 20
"""How much the layers that a rank runs may weigh; two at least, so that none is in the cache when its turn comes."""
TURN_S = 0.04
"""How long a layout runs in a turn, about."""
REST_S = 0.02
"""How long the cores rest before a turn: OpenMP's threads spin for some milliseconds after their last work."""
TURNS = 5
"""How often each is run with its cores to itself."""
LIMIT_S = 3.0
"""How long it may take until each was."""
DISTURBED = 0.02
"""The share of a turn that its threads may wait for their cores: more, and it says nothing about the layout."""
LATE_S = 60.0

mkldnn: Any = torch.ops.mkldnn


class Layers:
    """A rank's share of some layers of a transformer encoder; the weights mean nothing.

    Args:
        shape: ``hidden``, ``intermediate``, ``heads``, ``layers``, ``dtype``, ``rows`` and ``length`` of a step.
    """

    def __init__(self, shape: dict[str, Any], collective: Collective) -> None:
        heads, hidden, tp = shape["heads"], shape["hidden"], collective.size
        self._rows, self._length, self._collective = shape["rows"], shape["length"], collective
        self._heads = -(-heads // tp)  # the largest share, for which the others wait
        self._width = max(1, hidden // heads)
        self._dtype = DTYPES[shape["dtype"]]
        own, up = self._heads * self._width, -(-shape["intermediate"] // tp)
        sizes = [(3 * own, hidden), (hidden, own), (up, hidden), (hidden, up)]
        layer_bytes = sum(o * i for o, i in sizes) * self._dtype.itemsize
        self.count = min(shape["layers"], max(2, min(4, LAYERS_BYTES // max(1, layer_bytes))))
        self._layers = [[self._linear(*size) for size in sizes] for _ in range(self.count)]
        use_huge_pages(weight for layer in self._layers for weight, _ in layer)
        self._norm = torch.ones(hidden, dtype=self._dtype)
        self._x = torch.full((self._rows * self._length, hidden), 0.5, dtype=self._dtype)

    def _linear(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        weight = torch.full((outputs, inputs), 1 / inputs, dtype=self._dtype)
        return pack(weight), torch.zeros(outputs, dtype=self._dtype)

    def step(self) -> None:
        """One step: ``[T, H]`` through every layer."""
        x = self._x
        for layer in self._layers:
            qkv, out, up, down = layer
            x = self._add_and_norm(self._apply(self._attend(self._apply(x, qkv)), out), x)
            x = self._add_and_norm(self._apply(self._apply(x, up, "gelu"), down), x)

    @staticmethod
    def _apply(x: Tensor, linear: tuple[Tensor, Tensor], activation: str = "none") -> Tensor:
        made: Tensor = mkldnn._linear_pointwise(x, *linear, activation, [], "none" if activation == "gelu" else "")
        return made

    def _attend(self, qkv: Tensor) -> Tensor:
        rows, length = self._rows, self._length
        q, k, v = qkv.view(rows, length, 3, self._heads, self._width).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).reshape(rows * length, self._heads * self._width)

    def _add_and_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._collective.size > 1:
            x = self._collective.all_reduce(x)
        return F.layer_norm(x + residual, self._norm.shape, self._norm, self._norm)


def _rank(shape: dict[str, Any], meet: Rendezvous, cores: tuple[int, ...], pipe: Connection) -> None:
    """A rank's process, until it is killed: says how many layers it has, then how long the steps took that it ran."""
    _end_with(os.getppid())
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    with torch.inference_mode():
        layers = Layers(shape, join(meet))
        layers.step()
        pipe.send(layers.count)
        while True:
            steps = pipe.recv()
            waited, started = _waited_s(), time.perf_counter()
            for _ in range(steps):
                layers.step()
            elapsed = time.perf_counter() - started
            pipe.send((elapsed / steps, _waited_s() - waited <= DISTURBED * elapsed * len(cores)))


def _end_with(parent: int) -> None:
    """Have the kernel end this process with ``parent``, however that ends. Source: prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def _waited_s() -> float:
    """How long the threads of this process have waited for a core that another process had, seconds.

    Source: the kernel's documentation of schedstat, /proc/<pid>/schedstat, second field.
    """
    waited = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            waited += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has ended, or a kernel without it
            continue
    return waited / 1e9


class Ranks:
    """All ranks of a layout (replicas, tp, cores per rank), every group of it, waiting for their turn."""

    def __init__(self, shape: dict[str, Any], layout: Sequence[int], cores: list[int]) -> None:
        replicas, tp, width = layout
        self._pipes: list[Connection] = []
        self.best_s, self._steps = float("inf"), 1
        self.turns = 0
        fork = get_context("fork")  # torch has been imported and has not run: it has no threads yet
        self._processes = []
        for group in range(replicas):
            memory, store = os.memfd_create("tpray-memory"), os.memfd_create("tpray-store")
            for rank in range(tp):
                first = (group * tp + rank) * width
                own, theirs = fork.Pipe()
                meet = Rendezvous(rank, tp, os.dup(memory), os.dup(store), LATE_S)
                given = tuple(cores[first : first + width])
                process = fork.Process(target=_rank, args=(shape, meet, given, theirs), daemon=True)
                process.start()
                theirs.close()
                for fd in (meet.memory_fd, meet.store_fd):
                    os.close(fd)
                self._pipes.append(own)
                self._processes.append(process)
            os.close(memory)
            os.close(store)

    def prepare(self) -> None:
        """Wait until every rank has run once, and find how many steps make a turn."""
        self._layers = max(self._answer(pipe) for pipe in self._pipes)
        step_s = min(self._run()[0] for _ in range(3))
        self._steps = max(1, int(TURN_S / step_s))

    def turn(self) -> None:
        """Run once more; a turn in which others had the cores does not count."""
        step_s, alone = self._run()
        if alone:
            self.turns += 1
            self.best_s = min(self.best_s, step_s / self._layers)

    def _run(self) -> tuple[float, bool]:
        """The time of a step, of the rank that took longest, seconds; whether all had their cores to themselves."""
        time.sleep(REST_S)
        for pipe in self._pipes:
            pipe.send(self._steps)
        answers = [self._answer(pipe) for pipe in self._pipes]
        return max(step_s for step_s, _ in answers), all(alone for _, alone in answers)

    @staticmethod
    def _answer(pipe: Connection) -> Any:
        if not pipe.poll(LATE_S):
            raise TimeoutError("a rank does not answer")
        return pipe.recv()

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()  # it has nothing that anybody wants
        for process in self._processes:
            process.join()


def measure(shape: dict[str, Any], layouts: list[list[int]]) -> list[float] | None:
    """The time of one layer in each layout (replicas, tp, cores per rank), seconds; None: the machine is too busy."""
    cores = sorted(os.sched_getaffinity(0))
    teams = [Ranks(shape, layout, cores) for layout in layouts]
    try:
        for team in teams:
            team.prepare()
        give_up = time.monotonic() + LIMIT_S
        while min(team.turns for team in teams) < TURNS and time.monotonic() < give_up:
            for team in teams:
                team.turn()
    finally:
        for team in teams:
            team.end()
    return [team.best_s for team in teams] if all(team.turns for team in teams) else None


def times_float32(dtype: str) -> float:
    """How many times as long as in float32 a matrix product of a feed-forward takes in ``dtype``, on one thread."""
    torch.set_num_threads(1)
    rows, weight = torch.ones(128, 768), torch.ones(3072, 768)

    def best_s(product: Callable[[], object]) -> float:
        times = []
        for _ in range(9):
            started = time.perf_counter()
            product()
            times.append(time.perf_counter() - started)
        return min(times)

    x, other = rows.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    packed = mkldnn._reorder_linear_weight(weight, len(rows))
    with torch.inference_mode():
        float32_s = best_s(lambda: mkldnn._linear_pointwise(rows, packed, None, "none", [], ""))
        return best_s(lambda: F.linear(x, other)) / float32_s  # not prepacked: oneDNN refuses what it would emulate


def main() -> None:
    """Answer what standard input asks."""
    asked = json.load(sys.stdin)
    if "dtype" in asked:
        json.dump(times_float32(asked["dtype"]), sys.stdout)
    else:
        json.dump(measure(asked["shape"], asked["layouts"]), sys.stdout)


if __name__ == "__main__":
    main()
