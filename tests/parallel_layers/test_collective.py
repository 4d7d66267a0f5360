"""Collectives between ranks that are threads: of one process, but with memory, sockets and counters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tpray.errors import CollectiveError
from tpray.parallel_layers.collective import Collective
from tpray.parallel_layers.counters import furthest_behind, read_counters, read_waits_s
from tpray.parallel_layers.gloo import GlooCollective
from tpray.parallel_layers.rendezvous import Rendezvous, join
from tpray.parallel_layers.shared_memory import SharedMemoryCollective

SLOT_BYTES = 1024  # small, so that tensors go in pieces


def make_shared(size: int, timeout_s: float = 20.0) -> list[Collective]:
    memory = os.memfd_create("memory")
    return [SharedMemoryCollective(rank, size, os.dup(memory), timeout_s, SLOT_BYTES) for rank in range(size)]


def make_gloo(size: int) -> list[Collective]:
    store = os.memfd_create("store")
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: GlooCollective(rank, size, os.dup(store), 20.0), range(size)))


def on_every_rank(members: list[Collective], work: Callable[[Collective], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(work, members))


@pytest.mark.parametrize("make", [make_shared, make_gloo])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_same_right_result(make: Callable[[int], list[Collective]], size: int) -> None:
    members = make(size)
    generator = torch.Generator().manual_seed(1)
    for shape, dtype in (((1,), torch.float32), ((3, 5), torch.bfloat16), ((7, 11, 13), torch.float32),
                         ((2, 1000), torch.bfloat16), ((0, 4), torch.float32), ((5,), torch.int64)):  # fmt: skip
        xs = [(torch.randn(shape, generator=generator) * 100).to(dtype) for _ in members]

        def work(member: Collective, xs: list[Tensor] = xs) -> tuple[Tensor, Tensor, Tensor]:
            x = xs[member.rank]
            strided = x.repeat_interleave(2, dim=-1)[..., ::2]  # a view that is not contiguous
            return member.all_reduce(strided), member.all_gather(x, x.dim() - 1), member.broadcast(x, size - 1)

        wide = torch.float64 if dtype.is_floating_point else dtype
        expected = torch.stack([x.to(wide) for x in xs]).sum(0)
        results = on_every_rank(members, work)
        for total, gathered, sent in results:
            assert torch.equal(total, results[0][0]), "the ranks must hold the same bits"
            error = (total.to(wide) - expected).abs()
            unit = {torch.float32: 2e-7, torch.bfloat16: 2**-8}.get(dtype, 0)  # one rounding, of the result
            scale = torch.stack([x.to(wide).abs() for x in xs]).sum(0)
            assert (error <= unit * (scale if dtype is torch.float32 else expected.abs()) + 1e-30).all()
            assert torch.equal(gathered, torch.cat(xs, dim=-1))
            assert torch.equal(sent, xs[-1])
    assert len({member.begun for member in members}) == 1, "ranks that made the same calls are at one place"
    for member in members:
        member.close()


def test_many_in_a_row_never_mix() -> None:
    """Were a slot used again too early, some rank would read the numbers of another round."""

    def work(member: Collective) -> None:
        for i in range(300):
            total = member.all_reduce(torch.full((64,), float(i * (member.rank + 1))))
            assert total.eq(i * 6).all(), i

    on_every_rank(make_shared(3), work)


def test_results_are_not_views_of_shared_memory() -> None:
    def work(member: Collective) -> tuple[Tensor, ...]:
        x = torch.full((8,), float(member.rank))
        first = member.all_reduce(x), member.all_gather(x, 0), member.broadcast(x, 1)
        for _ in range(4):
            member.all_reduce(x + 100)
        return first

    for total, gathered, sent in on_every_rank(make_shared(2), work):
        assert total.eq(1).all()
        assert gathered.tolist() == [0.0] * 8 + [1.0] * 8
        assert sent.eq(1).all()


def test_a_rank_that_does_not_come_is_named() -> None:
    members = make_shared(3, timeout_s=0.3)
    absent = threading.Event()

    def work(member: Collective) -> str:
        if member.rank == 1:
            absent.wait(5)
            return ""
        with pytest.raises(CollectiveError) as caught:
            member.all_reduce(torch.ones(4))
        absent.set()
        return str(caught.value)

    messages = on_every_rank(members, work)
    assert messages[0] == "rank 0 waited 0.3 s in a collective for rank 1"
    assert messages[2].endswith("for rank 1")


def test_the_owner_of_the_memory_sees_who_is_behind() -> None:
    memory = os.memfd_create("memory")
    assert read_counters(memory, 3) == [], "nobody has come"
    members = [SharedMemoryCollective(rank, 3, os.dup(memory), 20.0, SLOT_BYTES) for rank in range(3)]
    on_every_rank([*members], lambda member: member.all_reduce(torch.ones(4)))
    counters = read_counters(memory, 3)
    assert counters == [member.begun for member in members]
    assert len(set(counters)) == 1
    assert furthest_behind(counters, {0, 1, 2}) == [], "nobody is"
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(members[rank].all_gather, torch.ones(2), 0) for rank in (0, 2)]
        while read_counters(memory, 3) != [counters[0] + 1, counters[0], counters[0] + 1]:
            time.sleep(0.001)
        assert furthest_behind(read_counters(memory, 3), {0, 1, 2}) == [1]
        assert furthest_behind(read_counters(memory, 3), {0, 2}) == [], "of those that have not answered"
        time.sleep(0.2)
        before = read_waits_s(memory, 3)
        members[1].all_gather(torch.ones(2), 0)
        for each in waiting:
            assert each.result(10).shape == (6,)
    waited = [after - begun for after, begun in zip(read_waits_s(memory, 3), before, strict=True)]
    assert min(waited[0], waited[2]) > max(0.2, waited[1])
    assert waited[1] > 0


@pytest.mark.slow
def test_ranks_may_outnumber_cores() -> None:
    """Eight processes on one core: whoever waits must let the others run."""
    script = (
        "import os, sys, torch\n"
        "from tpray.parallel_layers.shared_memory import SharedMemoryCollective as C\n"
        "torch.set_num_threads(1)\n"
        "rank, fd = int(sys.argv[1]), int(sys.argv[2])\n"
        "c = C(rank, 8, fd, 60.0)\n"
        "print(sum(c.all_reduce(torch.full((10,), float(rank))).sum().item() for _ in range(50)))\n"
    )
    memory = os.memfd_create("memory")
    core = min(os.sched_getaffinity(0))
    ranks = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, "-c", script, str(rank), str(memory)],
            stdout=subprocess.PIPE, pass_fds=[memory], text=True,
        )
        for rank in range(8)
    ]  # fmt: skip
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [f"{50 * 280.0}\n"] * 8


def test_gloo_is_taken_where_stores_are_not_ordered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def joined_kinds() -> list[type]:
        memory, store = os.memfd_create("memory"), os.memfd_create("store")
        with ThreadPoolExecutor(2) as pool:
            meets = [Rendezvous(rank, 2, os.dup(memory), os.dup(store), 20.0) for rank in range(2)]
            joined = list(pool.map(join, meets))
        assert on_every_rank(joined, lambda m: m.all_reduce(torch.ones(2)).tolist()) == [[2.0, 2.0]] * 2
        return [type(member) for member in joined]

    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert joined_kinds() == [SharedMemoryCollective] * 2
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert joined_kinds() == [GlooCollective] * 2
    assert "aarch64 does not order its stores" in caplog.text
