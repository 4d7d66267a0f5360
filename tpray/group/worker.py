"""One rank: a plain class. A Ray actor in service (`ray_executor`), a thread in tests (`thread_executor`).

Its methods are the start-up phases, called through Ray one after another; those that compute do so on the rank's
`ProgramThread`. From `connect` on, that thread also answers the wire: receive a frame, run the program, answer. That
is the hot path, and Ray is not on it.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tpray.artifacts.folder import Artifact, UserModelArtifact, record_files
from tpray.artifacts.manifest import RankRecord
from tpray.errors import GroupError, RankError, TprayError
from tpray.group import wire
from tpray.group.jobs import Loaded, ShardJob, UserModelJob, UserModelTrace, WorkerInfo
from tpray.group.program_thread import ProgramThread
from tpray.group.wire import Frame, Kind
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.parallel_layers.collective import Collective, SingleRank
from tpray.parallel_layers.layers import is_sharded
from tpray.parallel_layers.rendezvous import Rendezvous, join
from tpray.platforms import cores, lease
from tpray.platforms.memory import return_free_memory
from tpray.platforms.topology import Topology
from tpray.runtime.base import DTYPES, Program, SavedShard, SavedUserModel, runtime_for
from tpray.runtime.records import Canary
from tpray.runtime.user_model import FlatModel, as_array, explain

log = logging.getLogger(__name__)

_UNFINISHED = torch.empty(0)
_TRACEABLE = "it must not depend on values in its tensors: choose by value with torch.where, take sizes from shapes"


class ShardWorker:
    """One rank of a group.

    Args:
        topology: of the group.
        exit_process: called when the owner is gone; a thread that is not a process of its own passes a no-op.
        first_core: see `tpray.runtime.base.Runtime`.
        assigned_cores: the ids of the cores that Ray gave this rank; () where ranks are pinned to CPU cores.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        exit_process: Callable[[int], object] = os._exit,
        first_core: int | None = None,
        assigned_cores: tuple[int, ...] = (),
    ) -> None:
        self.rank, self.topology = rank, topology
        self._runtime = runtime_for(topology, first_core)
        self._assigned_cores = assigned_cores
        self._exit = exit_process
        self._lease: lease.Lease | None = None
        self._all_cores = os.sched_getaffinity(0)
        self._collective: Collective = SingleRank()
        self._program: Program | None = None
        self._unfinished: Generator[None, None, Sequence[Tensor]] | None = None
        self._sock: socket.socket | None = None
        self._thread = ProgramThread(f"tpray-rank-{rank}", topology.threads)

    def info(self) -> WorkerInfo:
        """Where and what this rank is; also the proof that its process has come up."""
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = self._lease.ids if self._lease else self._assigned_cores
        return WorkerInfo(self.rank, os.getpid(), held, self.topology.threads, peak_kib * 1024)

    def pin(self) -> tuple[int, ...]:
        """Lease as many neighbouring cores as this rank has threads and stay on them; () if none are free.

        Where a control group grants less time than that of all cores, other containers see the same cores and not the
        leases: all would take the first ones. There the kernel places the threads.
        """
        self.unpin()
        if cores.core_count() < len(self._all_cores):
            return ()
        ranges = cores.cut_ranges(sorted(self._all_cores), self.topology.threads)
        self._lease = lease.take_cores(ranges)
        if self._lease is None:
            return ()
        _set_affinity(self._lease.ids)
        return self._lease.ids

    def end(self) -> None:
        """End the rank's thread, once it has done what it does."""
        self._thread.end()

    def unpin(self) -> None:
        """Give the cores back and run anywhere."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
            _set_affinity(tuple(self._all_cores))

    def connect(self, address: str, token: str, timeout_s: float, wait_s: float) -> None:
        """Join the wire and the group's collectives, and start answering steps.

        wait_s: see `tpray.group.executor.Executor.connect`.

        Raises:
            RankError: the accelerator's runtime does not start.
        """
        sock, (memory_fd, store_fd) = wire.connect(address, token, self.rank, 2, timeout_s)
        self._collective = join(Rendezvous(self.rank, self.topology.tp, memory_fd, store_fd, wait_s))
        try:
            self._runtime.join(self.rank, self.topology.tp)
        except TprayError:
            raise
        except Exception as e:
            raise RankError(
                f"rank {self.rank} cannot start the runtime {self.topology.runtime} on cores "
                f"{cores.describe(self._assigned_cores)}: {e}. `tpray doctor` says what is wrong, or who has them"
            ) from e
        self._sock = sock
        self._thread.serve(sock, self._answer)

    def trace(self, job: ShardJob) -> RankRecord:
        """Build this rank's shard, trace it and save it in the job's directory."""
        return self._thread.do(lambda: self._trace(job))

    def _trace(self, job: ShardJob) -> RankRecord:
        from tpray.parallel_layers.shard import build_shard

        shutil.rmtree(job.directory, ignore_errors=True)
        job.directory.mkdir(parents=True)
        with parallel_state.use(self.rank, self.topology.tp):
            shard = build_shard(job.checkpoint, DTYPES[job.dtype], self._runtime.attention, job.typed)
            in_int8 = job.checkpoint.plan.is_sharded if job.dtype == "int8" else None
            self._runtime.trace(shard, job.max_length, job.directory, job.buckets, self._report, in_int8)
        record = _record(shard, job.directory)
        del shard
        return_free_memory()
        return record

    def trace_user_model(self, job: UserModelJob) -> UserModelTrace:
        """Build a user's own model and trace it for each of the job's examples.

        Raises:
            TraceError: the user's function or the model raised, or cannot be traced.
            ConfigError: the io_aliases do not fit the model.
        """
        return self._thread.do(lambda: self._trace_user_model(job))

    def _trace_user_model(self, job: UserModelJob) -> UserModelTrace:
        job.directory.mkdir(parents=True)
        os.chdir(job.folder)
        with parallel_state.use(self.rank, self.topology.tp):
            try:
                made = job.make()
            except Exception as e:
                raise explain(e, f"rank {self.rank}: {getattr(job.make, '__name__', 'the function')} raised") from e
            model, aliases = made if isinstance(made, tuple) else (made, {})
            flat = FlatModel(model, job.inputs, aliases).eval()
            # A tensor that is given twice would be traced as one input: each gets a copy of its own.
            examples = [tuple(x.clone() for x in example) for example in job.examples]
            try:
                programs = self._runtime.trace_user_model(
                    flat, examples, job.directory, job.compiler_args, flat.aliases
                )
            except TprayError:  # its compiler's words
                raise
            except Exception as e:
                raise explain(e, f"rank {self.rank}: {type(model).__name__} cannot be traced ({_TRACEABLE})") from e
        outputs = tuple(flat.outputs(program.inputs) for program in programs)
        return UserModelTrace(_record(flat, job.directory), tuple(programs), outputs, flat.aliases)

    def try_trace_user_model(self, job: UserModelJob) -> UserModelTrace | TprayError:
        """`trace_user_model`, with what it raises returned, so that the group can choose whose words to show."""
        try:
            return self.trace_user_model(job)
        except TprayError as e:
            return e

    def load_user_model(self, artifact: UserModelArtifact) -> None:
        """Check this rank's files and load its programs.

        Raises:
            ArtifactError: a file is damaged.
        """
        artifact.check_rank(self.rank)
        manifest = artifact.manifest
        directory = artifact.rank_directory(self.rank)
        saved = SavedUserModel(directory, self.rank, manifest.tp, manifest.programs, manifest.aliases)
        self._program = self._thread.do(lambda: self._runtime.load_user_model(saved))

    def make_canary(self, checkpoint: Checkpoint, max_length: int) -> Canary:
        """The unsharded model's answer to a fixed input; see `runtime.canary`."""
        from tpray.runtime.canary import make_canary

        canary = self._thread.do(lambda: make_canary(checkpoint, max_length))
        return_free_memory()
        return canary

    def load(self, artifact: Artifact) -> Loaded:
        """Check this rank's files and load its program; what that can do.

        Raises:
            ArtifactError: a file is damaged.
            RankError: this machine could not load it.
        """
        artifact.check_rank(self.rank)
        manifest = artifact.manifest
        directory = artifact.rank_directory(self.rank)
        saved = SavedShard(directory, self.rank, manifest.tp, manifest.dtype, manifest.buckets, manifest.model.sharding)
        self._program = self._thread.do(lambda: self._runtime.load(saved))
        return_free_memory()
        return Loaded(self._program.packs_rows, self._program.parts)

    def _report(self, text: str) -> None:
        """Report to the owner; no step is in flight then, whose answer this could come between."""
        assert self._sock is not None, "connect() comes before trace()"
        self._sock.sendall(Frame(Kind.PROGRESS, text=text).encode())

    def _answer(self, sock: socket.socket) -> bool:
        """Answer a frame; False when there will be no more."""
        frame = wire.receive(sock)
        if frame is not None:
            with parallel_state.use(self.rank, self.topology.tp, self._collective), torch.inference_mode():
                answer = self._step(frame)
            with suppress(OSError):
                sock.sendall(answer)
                return True
        sock.close()
        self._collective.close()
        self._exit(0)  # the owner is gone: this rank has nobody to serve
        return False

    def _next_part(self) -> Sequence[Tensor]:
        """Go on with the step that began last: its outputs, or an empty one."""
        assert self._unfinished is not None, "a step that goes in parts begins with its first"
        try:
            next(self._unfinished)
        except StopIteration as e:
            self._unfinished = None
            outputs: Sequence[Tensor] = e.value
            return outputs
        return (_UNFINISHED,)

    def _step(self, frame: Frame) -> bytes:
        started, waited_ns = time.perf_counter(), self._collective.waited_ns
        try:
            assert self._program is not None, "no step is sent before the program is loaded"
            inputs = map(torch.from_numpy, frame.tensors)
            if frame.kind is Kind.BEGIN:
                self._unfinished = self._program.in_parts(*inputs)
            outputs = self._program(*inputs) if frame.kind is Kind.STEP else self._next_part()
            micros = int((time.perf_counter() - started) * 1e6)
            sent = tuple(map(as_array, outputs)) if self.rank == 0 else ()
            waited = -1 if waited_ns is None else ((self._collective.waited_ns or 0) - waited_ns) // 1000
            return Frame(Kind.RESULT, frame.step, sent, micros, waited=waited).encode()
        except Exception as e:  # whatever a program raises must reach the owner, not end the thread
            log.exception("rank %d: step %d failed", self.rank, frame.step)
            kind = Kind.FAULT if isinstance(e, GroupError) else Kind.ERROR
            begun = np.array(self._collective.begun, dtype=np.int64)
            return Frame(kind, frame.step, (begun,), text=f"{type(e).__name__}: {e}").encode()


def compute_alone() -> None:
    """Have every thread of this process compute alone, but those of ranks; see `ProgramThread`."""
    torch.set_num_threads(1)


def import_for_tracing() -> None:
    """Import what `ShardWorker.trace` needs, which takes seconds, before there is anything to trace."""
    import torch._dynamo  # noqa: F401
    from transformers import AutoModelForSequenceClassification  # noqa: F401

    from tpray.parallel_layers import shard  # noqa: F401


def _record(module: nn.Module, directory: Path) -> RankRecord:
    """What the manifest says of a rank that has traced ``module`` into ``directory``."""
    size = {True: 0, False: 0}
    for tensor in module.parameters():
        size[is_sharded(tensor)] += tensor.nbytes
    return RankRecord(files=record_files(directory), sharded_bytes=size[True], replicated_bytes=size[False])


def _set_affinity(ids: Sequence[int]) -> None:
    """Move every thread of this process to these cores; threads made later inherit them."""
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), ids)
        except ProcessLookupError:  # a thread that ended meanwhile
            continue
