"""What a rank takes of memory while it starts and when it serves: ``python -m tests.bench.memory [--layers N]``.

Each rank is a process of its own, as in a group but without Ray, whose worker adds a constant. A first start traces,
asks the unsharded model (rank 0), and loads; a second one only loads. The figures are the kernel's: the peak is VmHWM,
which counts pages of mapped files too, and what stays is RssAnon, which is the process's own. The constant is the same
of a model of next to no weights. Source: proc_pid_status(5).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Start = Literal["first", "second"]
LENGTH = 128
WORDS = 28_996


@dataclass(frozen=True)
class Figures:
    """Of one rank, bytes. shard: its weights. peak: the most that was resident. own_peak: of its own, without pages of
    files. kept: its own once it has served a step. mapped: pages of files that are resident then, which the kernel can
    drop and all processes share."""

    shard: int
    peak: int
    own_peak: int
    kept: int
    mapped: int


def checkpoint(folder: Path, layers: int, hidden: int = 768, words: int = WORDS) -> Path:
    """A classifier of BERT-base's shape with so many layers, float32, seeded random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    directory = folder / f"bert-{layers}-{hidden}"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    return _with_words(directory, words)


def decoder(folder: Path, layers: int) -> Path:
    """A reward model of Qwen2-7B's shape with so many layers of 28, bfloat16, in files of at most 1 GB."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    directory, words = folder / f"decoder-{layers}", 152_064
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=words, hidden_size=3584, num_hidden_layers=layers, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18_944, max_position_embeddings=32_768, num_labels=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    Qwen2ForSequenceClassification._from_config(config).save_pretrained(directory, max_shard_size="1GB")
    return _with_words(directory, words)


def _with_words(directory: Path, words: int) -> Path:
    """The same with a tokenizer of so many words."""
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*special, *(f"w{i}" for i in range(words - len(special)))]))
    BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


def measure(model: Path, folder: Path, tp: int, dtype: str) -> dict[Start, list[Figures]]:
    """The figures of each rank, in both starts."""
    directory = folder / f"{model.name}-{tp}-{dtype}"
    return {start: _start(start, model, directory, tp, dtype) for start in get_args(Start)}


def _start(start: Start, model: Path, directory: Path, tp: int, dtype: str) -> list[Figures]:
    fds = [os.memfd_create("memory"), os.memfd_create("store")]
    asked = [[start, str(model), str(directory), tp, dtype, rank, fds] for rank in range(tp)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.memory", "--rank", json.dumps(one)],
            pass_fds=fds, stdout=subprocess.PIPE, text=True,
        )
        for one in asked
    ]  # fmt: skip
    printed = [process.communicate(timeout=600)[0] for process in ranks]
    for fd in fds:
        os.close(fd)
    if any(process.returncode for process in ranks):
        raise RuntimeError("a rank failed; see its traceback above")
    return [Figures(**json.loads(text.splitlines()[-1])) for text in printed]


def run_rank(start: Start, model: str, directory: str, tp: int, dtype: str, rank: int, fds: Sequence[int]) -> Figures:
    """What a rank does in a start, with its worker's own methods, in this process."""
    import torch

    from tpray.group.jobs import ShardJob
    from tpray.group.worker import ShardWorker
    from tpray.parallel_layers import parallel_state
    from tpray.parallel_layers.checkpoint import find_checkpoint
    from tpray.parallel_layers.files import file_digest
    from tpray.parallel_layers.rendezvous import Rendezvous, join
    from tpray.platforms.memory import return_free_memory
    from tpray.platforms.topology import Topology
    from tpray.runtime.base import SavedShard, runtime_for

    watch = _Watch()
    own, topology = Path(directory) / f"rank{rank}", Topology(tp)
    size_file = own.with_suffix(".size")
    worker = ShardWorker(rank, topology)
    found = find_checkpoint(model)
    if start == "first":
        record = worker.trace(ShardJob(found, dtype, LENGTH, (), own, typed=True))
        size_file.write_text(str(record.sharded_bytes + record.replicated_bytes))
        if rank == 0:
            worker.make_canary(found, LENGTH)
    for path in own.iterdir():
        file_digest(path)
    program = runtime_for(topology).load(SavedShard(own, rank, tp, dtype, (), found.plan))
    return_free_memory()  # as its worker does
    collective = join(Rendezvous(rank, tp, os.dup(fds[0]), os.dup(fds[1]), 600.0))
    ids = torch.full((2, LENGTH), 7)
    with parallel_state.use(rank, tp, collective), torch.inference_mode():
        for _ in range(3):
            program(ids, torch.ones_like(ids), torch.zeros_like(ids))
    status = _status()
    sizes = status["VmHWM"], watch.end(), status["RssAnon"], status["RssFile"]
    return Figures(int(size_file.read_text()), *sizes)


class _Watch:
    """Looks at this process's own memory a thousand times a second: the kernel keeps no peak of it."""

    def __init__(self) -> None:
        self._peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self._peak = max(self._peak, _status()["RssAnon"])

    def end(self) -> int:
        """The peak, bytes."""
        self._over.set()
        self._thread.join()
        return self._peak


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts[-1] == "kB"}


def table(model: Path, empty: Path, folder: Path, cases: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Lines of MiB, and of what exceeds the constant (that of the model ``empty``) as a share of the shard."""
    names = ("shard", "peak", "own peak", "kept", "mapped", "peak/", "own/", "kept/", "constants")
    yield f"{'tp dtype start rank':22}" + "".join(f"{name:>9}" for name in names)
    for tp, dtype in cases:
        large, small = measure(model, folder, tp, dtype), measure(empty, folder, tp, dtype)
        for start, ranks in large.items():
            for rank, (own, none) in enumerate(zip(ranks, small[start], strict=True)):
                sizes = [own.shard, own.peak, own.own_peak, own.kept, own.mapped]
                constants = [none.peak, none.own_peak, none.kept]
                shares = [(a - b) / own.shard for a, b in zip(sizes[1:4], constants, strict=True)]
                yield (
                    f"{f'{tp} {dtype} {start} {rank}':22}"
                    + "".join(f"{size >> 20:9}" for size in sizes)
                    + "".join(f"{share:9.2f}" for share in shares)
                    + f"   {', '.join(str(size >> 20) for size in constants)}"
                )


def main() -> None:
    """Measure, or be the rank that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--decoder", action="store_true", help="of Qwen2-7B's shape, in bfloat16 at tp 1 and 2")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        asked: list[Any] = json.loads(arguments.rank)
        print(json.dumps(asdict(run_rank(*asked))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = (decoder if arguments.decoder else checkpoint)(folder, arguments.layers)
        empty = checkpoint(folder, 1, hidden=128, words=200)
        cases = [(tp, dtype) for dtype in ("float32", "bfloat16") for tp in (1, 2)][2 * arguments.decoder :]
        for line in table(model, empty, folder, cases):
            print(line, flush=True)


if __name__ == "__main__":
    main()
