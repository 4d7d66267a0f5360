"""What a first start asks transformers of a model, in the process of a rank that imports it anyway, to trace.

The command and the replica are told, and import neither transformers nor torch.
"""

from __future__ import annotations

from tpray.artifacts.manifest import FileRecord
from tpray.artifacts.resolve import TraceTask, check, describe
from tpray.config import ModelConfig
from tpray.parallel_layers.checkpoint import Checkpoint
from tpray.platforms.topology import Topology
from tpray.serving.codec import TextCodec
from tpray.serving.tokenizer_facts import facts_path, keep_facts, read_facts


def check_and_describe(checkpoint: Checkpoint, model: ModelConfig, topology: Topology) -> TraceTask:
    """What is to be traced of a checkpoint that `locate` has found.

    Raises:
        TprayError: it cannot be served; see `find_model`.
    """
    check(checkpoint, model, topology)
    return describe(checkpoint, model, topology)


def learn_tokenizer(task: TraceTask) -> None:
    """Keep what a replica must know of the tokenizer on this machine, unless it is there."""
    records = {name: FileRecord.of(path) for name, path in task.model_files.items()}
    path = facts_path(records, task.model.max_length)
    if read_facts(path) is None:
        codec = TextCodec(task.checkpoint.directory, task.model, chat_template=task.checkpoint.own_template)
        keep_facts(path, codec.facts)
