"""One rank: a plain class. A Ray actor in service (`ranks.RayRanks`), a thread in tests (`ranks.ThreadRanks`).

Its methods are the start-up phases, called through Ray one after another. From `connect` on, a thread of its
own answers the wire: receive a frame, run the program, answer. That is the hot path, and Ray is not on it.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tpray.config import RuntimeName, cache_dir
from tpray.errors import GroupError, RankError, TprayError
from tpray.group import cores, lease, wire
from tpray.group.wire import Frame, Kind
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.parallel_layers.collective import Collective, SingleRank, join
from tpray.parallel_layers.layers import is_sharded
from tpray.runtime.artifact import Artifact, Canary, FunctionArtifact, ProgramRecord, RankRecord, record_files
from tpray.runtime.base import DTYPES, Program, runtime_for
from tpray.runtime.buckets import Bucket
from tpray.runtime.function import FlatModel, as_array, explain, name_aliases
from tpray.runtime.neuron_env import NeuronPlace

log = logging.getLogger("tpray.group.worker")


@dataclass(frozen=True)
class RankInfo:
    """A rank as it is now. cores: those it has to itself, () when unpinned. peak_bytes: its largest resident size."""

    rank: int
    pid: int
    cores: tuple[int, ...]
    threads: int
    peak_bytes: int


MakeModel = Callable[[], Any]
"""Returns a model, or a model and its io_aliases; called on every rank, with parallel_state set."""


_TRACEABLE = "it must not depend on values in its tensors: choose by value with torch.where, take sizes from shapes"


@dataclass(frozen=True)
class FunctionTrace:
    """What a rank traced of a user's own model. aliases: names of its state -> the output that is their next value."""

    record: RankRecord
    programs: tuple[ProgramRecord, ...]
    aliases: dict[str, int]


class ShardWorker:
    """Rank ``rank`` of ``tp``.

    Args:
        threads: how many threads its program computes with.
        exit_process: called when the owner is gone; a thread that is no process of its own passes a no-op.
        place, neuron_cores: where its NeuronCores are, and their ids on the machine.
    """

    def __init__(
        self,
        rank: int,
        tp: int,
        runtime: RuntimeName,
        threads: int,
        exit_process: Callable[[int], object] = os._exit,
        place: NeuronPlace | None = None,
        neuron_cores: tuple[int, ...] = (),
    ) -> None:
        self.rank, self.tp, self.threads = rank, tp, threads
        self._runtime = runtime_for(runtime, place)
        self._neuron_cores = neuron_cores
        self._exit = exit_process
        self._lease: lease.CoreLease | None = None
        self._all_cores = os.sched_getaffinity(0)
        self._collective: Collective = SingleRank()
        self._program: Program | None = None
        self._sock: socket.socket | None = None
        torch.set_num_threads(threads)

    def info(self) -> RankInfo:
        """Where and what this rank is; also the proof that its process has come up."""
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = self._lease.cores if self._lease else self._neuron_cores
        return RankInfo(self.rank, os.getpid(), held, self.threads, peak_kib * 1024)

    def pin(self) -> tuple[int, ...]:
        """Lease as many neighbouring cores as this rank has threads and stay on them; () if none are free."""
        self.unpin()
        ranges = cores.cut_ranges(sorted(self._all_cores), self.threads)
        self._lease = lease.take(ranges, cache_dir() / "cores")
        if self._lease is None:
            return ()
        _set_affinity(self._lease.cores)
        return self._lease.cores

    def unpin(self) -> None:
        """Give the cores back and run anywhere."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
            _set_affinity(tuple(self._all_cores))

    def connect(self, address: str, token: str, timeout_s: float) -> None:
        """Join the wire and the group's collectives, and start answering steps.

        Raises:
            RankError: the accelerator's runtime does not start.
        """
        sock, (memory_fd, store_fd) = wire.connect(address, token, self.rank, 2, timeout_s)
        self._collective = join(self.rank, self.tp, memory_fd, store_fd, timeout_s)
        try:
            self._runtime.join(self.rank, self.tp)
        except TprayError:
            raise
        except Exception as e:
            raise RankError(
                f"rank {self.rank} cannot start the runtime {self._runtime.name} on cores "
                f"{cores.describe(self._neuron_cores)}: {e}. `tpray doctor` says what is wrong, or who has them"
            ) from e
        self._sock = sock
        threading.Thread(target=self._answer, args=(sock,), name=f"tpray-rank-{self.rank}", daemon=True).start()

    def trace(
        self, checkpoint: Checkpoint, dtype: str, max_length: int, buckets: Sequence[Bucket], directory: Path
    ) -> RankRecord:
        """Build this rank's shard, trace it and save it in ``directory``."""
        from tpray.parallel_layers.shard import build_shard

        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        with parallel_state.use(self.rank, self.tp):
            shard = build_shard(checkpoint, DTYPES[dtype], self._runtime.attention)
            self._runtime.trace(shard, max_length, directory, buckets, self._tell)
        return _record(shard, directory)

    def trace_function(
        self, make: MakeModel, examples: list[tuple[Tensor, ...]], folder: str, directory: Path
    ) -> FunctionTrace:
        """Build a model of the user's own and trace it for each of ``examples``. folder: where ``make`` runs.

        Raises:
            TraceError: ``make`` or the model raised, or cannot be traced.
            ConfigError: the io_aliases do not fit the model.
        """
        directory.mkdir(parents=True)
        os.chdir(folder)
        with parallel_state.use(self.rank, self.tp):
            try:
                made = make()
            except Exception as e:
                raise explain(e, f"rank {self.rank}: {getattr(make, '__name__', 'the function')} raised") from e
            model, aliases = made if isinstance(made, tuple) else (made, {})
            flat = FlatModel(model).eval()
            try:
                programs = self._runtime.trace_function(flat, examples, directory)
            except TprayError:  # its compiler's words
                raise
            except Exception as e:
                raise explain(e, f"rank {self.rank}: {type(model).__name__} cannot be traced ({_TRACEABLE})") from e
            names = name_aliases(flat, aliases, programs[0].outputs)
        return FunctionTrace(_record(flat, directory), tuple(programs), names)

    def try_trace_function(
        self, make: MakeModel, examples: list[tuple[Tensor, ...]], folder: str, directory: Path
    ) -> FunctionTrace | TprayError:
        """`trace_function`, with what it raises returned, so that the group can choose whose words to show."""
        try:
            return self.trace_function(make, examples, folder, directory)
        except TprayError as e:
            return e

    def load_function(self, artifact: FunctionArtifact) -> None:
        """Check this rank's files and load its programs.

        Raises:
            ArtifactError: a file is damaged.
        """
        artifact.check_rank(self.rank)
        self._program = self._runtime.load_function(artifact, self.rank)

    def make_canary(self, checkpoint: Checkpoint, max_length: int) -> Canary:
        """The unsharded model's answer to a fixed input; see `runtime.canary`."""
        from tpray.runtime.canary import make_canary

        return make_canary(checkpoint, max_length)

    def load(self, artifact: Artifact) -> bool:
        """Check this rank's files and load its program; whether that packs rows.

        Raises:
            ArtifactError: a file is damaged.
        """
        artifact.check_rank(self.rank)
        self._program = self._runtime.load(artifact, self.rank)
        return self._program.packs_rows

    def _tell(self, text: str) -> None:
        """Tell the owner; no step is in flight then, whose answer this could come between."""
        assert self._sock is not None, "connect() comes before trace()"
        self._sock.sendall(Frame(Kind.NOTE, text=text).encode())

    def _answer(self, sock: socket.socket) -> None:
        torch.set_num_threads(self.threads)  # OpenMP keeps the number per thread
        with parallel_state.use(self.rank, self.tp, self._collective), torch.inference_mode():
            while (frame := wire.receive(sock)) is not None:
                try:
                    sock.sendall(self._step(frame).encode())
                except OSError:
                    break
        sock.close()
        self._collective.close()
        self._exit(0)  # the owner is gone: this rank has nobody to serve

    def _step(self, frame: Frame) -> Frame:
        started = time.perf_counter()
        try:
            if self._program is None:
                _refuse("a step came before the program was loaded")
            outputs = self._program(*(torch.from_numpy(array) for array in frame.tensors))
        except Exception as e:  # noqa: BLE001  # whatever a program raises must reach the owner, not end the thread
            log.error("rank %d: step %d failed\n%s", self.rank, frame.step, traceback.format_exc())
            return Frame(Kind.ERROR, frame.step, text=f"{type(e).__name__}: {e}")
        micros = int((time.perf_counter() - started) * 1e6)
        sent = tuple(map(as_array, outputs)) if self.rank == 0 else ()
        return Frame(Kind.RESULT, frame.step, sent, micros)


def _record(module: nn.Module, directory: Path) -> RankRecord:
    """What the manifest says of a rank that has traced ``module`` into ``directory``."""
    size = {True: 0, False: 0}
    for tensor in module.parameters():
        size[is_sharded(tensor)] += tensor.nbytes
    return RankRecord(files=record_files(directory), sharded_bytes=size[True], replicated_bytes=size[False])


def _refuse(reason: str) -> NoReturn:
    raise GroupError(reason)


def _set_affinity(ids: Sequence[int]) -> None:
    """Move every thread of this process to these cores; threads made later inherit them."""
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), ids)
        except ProcessLookupError:  # a thread that ended meanwhile
            continue
