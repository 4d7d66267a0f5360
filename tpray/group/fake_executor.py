"""An executor without a model: its ranks speak the real wire, and die, hang, are late or answer wrongly on command.

With it starts, failures and restarts, and everything above them, are tested in milliseconds: no torch, no Ray, no
process. A rank is a thread that answers each step with `fake_logits`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tpray.artifacts.manifest import RankRecord
from tpray.errors import GroupError, TprayError
from tpray.group import wire
from tpray.group.jobs import Loaded, ShardJob, UserModelJob, UserModelTrace, WorkerInfo
from tpray.group.wire import Array, Frame, Kind
from tpray.platforms.topology import Topology
from tpray.runtime.records import Canary

if TYPE_CHECKING:
    from tpray.artifacts.folder import Artifact, UserModelArtifact
    from tpray.parallel_layers.checkpoint import Checkpoint

Answer = Callable[[Frame], Frame | None]
"""What a rank says to a step; None: nothing."""


def fake_logits(ids: Array, mask: Array, labels: int = 2) -> Array:
    """Logits float32 ``[B, labels]`` that depend on the tokens of their row and on nothing else."""
    total = (ids * mask).sum(axis=1, keepdims=True) % 97
    logits: Array = (total / 97 + np.arange(labels)).astype(np.float32)
    return logits


class _FakeRank(threading.Thread):
    """One rank: it answers steps until its socket closes."""

    def __init__(self, rank: int, sock: socket.socket, answer: Answer) -> None:
        super().__init__(name=f"tpray-fake-{rank}", daemon=True)
        self.sock, self.answer = sock, answer
        self.start()

    def run(self) -> None:
        while (frame := wire.receive(self.sock)) is not None:
            answered = self.answer(frame)
            if answered is not None:
                try:
                    self.sock.sendall(answered.encode())
                except OSError:
                    break
        self.sock.close()

    def die(self) -> None:
        """Close the wire, as the end of a process does."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed already
            return


class FakeExecutor:
    """See `tpray.group.executor.Executor`.

    ``calls`` lists the calls in their order. Commands may come at any time; those for a rank hold until it is
    killed, and a rank that is spawned again is whole. `raise_on` and `die_of` are about inputs, and hold on.

    Args:
        topology: or a degree, on CPU cores.
        labels: how many logits a row has.
        token_s: how long a step takes for each of its tokens, seconds. The ranks sleep: many groups can share a CPU.
    """

    def __init__(self, topology: Topology | int = 2, labels: int = 2, token_s: float = 0.0) -> None:
        self.topology = Topology(topology, fake=True) if isinstance(topology, int) else replace(topology, fake=True)
        self.labels, self.token_s = labels, token_s
        self.calls: list[str] = []
        self.steps: list[tuple[Array, ...]] = []
        """The inputs of every step that rank 0 was sent, in their order."""
        self._ranks: list[_FakeRank] = []
        self._raises: list[tuple[Callable[[Array], bool], str, tuple[int, ...]]] = []
        self._deadly: list[tuple[Callable[[Array], bool], int]] = []
        self._failures: dict[str, list[TprayError]] = {}
        self._blocked: dict[str, asyncio.Event] = {}

    # Commands

    def die(self, rank: int) -> None:
        """Have a rank's process end."""
        self._ranks[rank].die()

    def hang(self, rank: int) -> None:
        """Have a rank take steps and never answer."""
        self._ranks[rank].answer = lambda frame: None

    def delay(self, rank: int, seconds: float) -> None:
        """Have a rank answer each step so much later."""

        def late(frame: Frame) -> Frame | None:
            time.sleep(seconds)
            return self._answer(rank, frame)

        self._ranks[rank].answer = late

    def answer(self, rank: int, answer: Answer) -> None:
        """Have a rank answer as ``answer`` says."""
        self._ranks[rank].answer = answer

    def raise_on(self, when: Callable[[Array], bool], text: str, ranks: Sequence[int] | None = None) -> None:
        """Have ranks (default: all) raise in each step whose token ids satisfy ``when``; text: the type and the words.

        It holds for ranks that are spawned again, too: it is the input's fault.
        """
        self._raises.append((when, text, tuple(range(self.topology.tp) if ranks is None else ranks)))

    def die_of(self, when: Callable[[Array], bool], rank: int = 1) -> None:
        """Have a rank's process end in each step whose token ids satisfy ``when``, also once it was spawned again."""
        self._deadly.append((when, rank))

    def fail(self, call: str, error: TprayError, times: int = 1) -> None:
        """Have the next calls of that name raise ``error``."""
        self._failures.setdefault(call, []).extend([error] * times)

    def block(self, call: str) -> asyncio.Event:
        """Have calls of that name wait until the event that is returned is set."""
        return self._blocked.setdefault(call, asyncio.Event())

    def report(self, rank: int, text: str) -> None:
        """Have a rank say what it has done."""
        self._ranks[rank].sock.sendall(Frame(Kind.PROGRESS, text=text).encode())

    # The protocol

    async def place(self) -> None:
        await self._called("place")

    async def spawn(self) -> list[WorkerInfo]:
        await self._called("spawn")
        return self._infos()

    async def pin(self) -> list[WorkerInfo]:
        await self._called("pin")
        return self._infos()

    async def connect(self, address: str, token: str, timeout_s: float, wait_s: float) -> None:
        await self._called("connect")
        ranks = range(self.topology.tp)
        joined = await asyncio.gather(
            *(asyncio.to_thread(wire.connect, address, token, rank, 2, timeout_s) for rank in ranks)
        )
        for rank, (sock, fds) in enumerate(joined):
            for fd in fds:
                os.close(fd)
            self._ranks.append(self._fake_rank(rank, sock))

    def _fake_rank(self, rank: int, sock: socket.socket) -> _FakeRank:
        return _FakeRank(rank, sock, lambda frame: self._answer(rank, frame))

    async def trace(self, jobs: Sequence[ShardJob]) -> list[RankRecord]:
        await self._called("trace")
        return [RankRecord(files={}, sharded_bytes=0, replicated_bytes=0) for _ in jobs]

    async def make_canary(self, checkpoint: Checkpoint, max_length: int) -> Canary:
        await self._called("make_canary")
        self.labels = checkpoint.config.num_labels
        ids = np.array([[3, 1, 4, 1], [5, 9, 0, 0]])
        mask = (ids != 0).astype(np.int64)
        logits = fake_logits(ids, mask, self.labels)
        ids_, mask_, types_, logits_ = (tuple(map(tuple, x.tolist())) for x in (ids, mask, mask * 0, logits))
        return Canary(input_ids=ids_, attention_mask=mask_, token_type_ids=types_, logits=logits_)

    async def load(self, artifact: Artifact) -> Loaded:
        await self._called("load")
        self.labels = len(artifact.manifest.model.labels)
        return Loaded()

    async def trace_user_model(self, jobs: Sequence[UserModelJob]) -> list[UserModelTrace]:
        await self._called("trace_user_model")
        raise GroupError("the fake executor traces no model")

    async def load_user_model(self, artifact: UserModelArtifact) -> None:
        await self._called("load_user_model")

    async def kill(self) -> None:
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.die()
        await self._called("kill")

    def release(self) -> None:
        self.calls.append("release")

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self._blocked:
            await self._blocked[name].wait()
        if self._failures.get(name):
            raise self._failures[name].pop(0)

    def _infos(self) -> list[WorkerInfo]:
        return [WorkerInfo(rank, os.getpid(), (), 1, 0) for rank in range(self.topology.tp)]

    def _answer(self, rank: int, frame: Frame) -> Frame | None:
        for when, dies in self._deadly:
            if rank == dies and when(frame.tensors[0]):
                for gone in self._ranks[rank : rank + 1]:  # none, if all are being killed
                    gone.die()
                return None
        for when, text, ranks in self._raises:
            if rank in ranks and when(frame.tensors[0]):
                return Frame(Kind.ERROR, frame.step, text=text)
        if self.token_s:
            time.sleep(self.token_s * int(frame.tensors[1].sum()))
        if rank != 0:
            return Frame(Kind.RESULT, frame.step)
        self.steps.append(frame.tensors)
        ids, mask = frame.tensors[:2]
        return Frame(Kind.RESULT, frame.step, (fake_logits(ids, mask, self.labels),), 1)
