"""Every architecture on neuron-xla: lowered by the real torch-xla, executed by XLA, compared with transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import end_id_of, pad_id_of, rows
from tests.runtime.test_parity import GROUPED, stock_logits
from tpray.config import DtypeName, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.shard import build_shard
from tpray.platforms.topology import Topology
from tpray.runtime.base import DTYPES, SavedShard
from tpray.runtime.buckets import Bucket
from tpray.runtime.neuron.hlo import OPCODES, Lowered
from tpray.runtime.neuron.xla import NeuronXlaRuntime

pytestmark = pytest.mark.xla

BUCKETS = ((2, 16), (4, 48))
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}


def answer(directory: Path, tp: int, dtype: DtypeName, batches: list[Any]) -> list[np.ndarray]:
    """The logits of each batch."""

    async def run() -> list[np.ndarray]:
        topology = Topology(tp, "neuron-xla", layout="single-process", instance_family="trn1")
        group = ClassifierGroup(
            ModelConfig(source=str(directory), dtype=dtype, buckets=BUCKETS), ThreadExecutor(topology)
        )
        await group.start()
        try:
            return [(await group.step(batch)).logits for batch in batches]
        finally:
            await group.stop()

    return asyncio.run(run())


def answer_directly(directory: Path, tp: int, dtype: DtypeName, batches: list[Any]) -> list[np.ndarray]:
    """The same without a group, for models that read padding: no group pads their rows to buckets."""
    checkpoint, root = find_checkpoint(directory), directory / f"direct-{tp}-{dtype}"
    topology = Topology(tp, "neuron-xla", layout="single-process", instance_family="trn1")
    buckets = tuple(Bucket(*batch[0].shape) for batch in batches)
    runtimes = [NeuronXlaRuntime(topology, first_core=rank) for rank in range(tp)]
    folders = [root / f"rank_{rank}" for rank in range(tp)]
    for rank, (runtime, folder) in enumerate(zip(runtimes, folders, strict=True)):
        folder.mkdir(parents=True)
        with parallel_state.use(rank, tp):
            runtime.trace(build_shard(checkpoint, DTYPES[dtype], runtime.attention), 80, folder, buckets)

    def run(rank: int) -> list[np.ndarray]:
        program = runtimes[rank].load(SavedShard(folders[rank], rank, tp, dtype, buckets, checkpoint.plan))
        return [program(*map(torch.from_numpy, batch))[0].numpy() for batch in batches]

    with ThreadPoolExecutor(tp) as pool:
        return next(iter(pool.map(run, range(tp))))


SERVED = [
    "bert", "roberta", "xlm-roberta", "distilbert", "albert", "mpnet", "deberta", "deberta-v2", "modernbert",
    "roformer", "nystromformer", "esm", "nomic_bert", "gte", "rembert", "bart", "t5",
    "gpt2", "llama", "qwen3", "gemma",
]  # fmt: skip
"""Of the architectures that it can lower, those that differ from the others: all would take too long."""


@pytest.mark.parametrize(("tp", "dtype"), [(2, "float32"), (3, "float32"), (3, "bfloat16")])
@pytest.mark.parametrize("model_type", SERVED)
def test_the_programs_are_whole_and_give_the_stock_models_logits(
    model_type: str, tp: int, dtype: DtypeName, make_checkpoint: Callable[..., Path], loaded_programs: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    sizes: dict[str, Any] = {"num_attention_heads": 6, "hidden_size": 96, "intermediate_size": 192, "vocab_size": 360}
    if model_type in GROUPED:
        sizes["num_key_value_heads"] = 1 if model_type == "gemma" else tp
    directory = make_checkpoint(model_type, **sizes)
    ends = pad_id_of(directory), end_id_of(directory)
    if PLANS[model_type].reads_padding:
        batches = [rows([16, 16], *ends), rows([48, 48, 48, 48], *ends)]
        found = answer_directly(directory, tp, dtype, batches)
    else:
        batches = [rows([1, 16, 7], *ends), rows([33, 48], *ends)]
        found = answer(directory, tp, dtype, batches)
    worst = 0.0
    for batch, logits in zip(batches, found, strict=True):
        expected = stock_logits(directory, batch)
        worst = max(worst, float(np.abs(logits - expected).max() / max(1.0, np.abs(expected).max())))
    programs = [Lowered(path.read_text()) for path in sorted(loaded_programs.iterdir())]
    assert len(programs) == tp * len(BUCKETS)
    for start in range(0, len(programs), tp):
        ranks = programs[start : start + tp]
        assert len({rank.text.replace("\n", "") for rank in ranks}) == 1
    counts = programs[0].opcodes
    collectives = f"{counts['all-reduce']} | {counts['all-gather']}"
    record_property("architecture", f"| {model_type} | {tp} | {dtype} | {collectives} | {worst:.1e} |")
    assert set(counts) <= OPCODES
    assert worst < TOLERANCE[dtype]
