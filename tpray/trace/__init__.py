"""A user's own model with parallel layers, traced on a group of ranks: the calls of AWS's tutorial.

Knows Ray only through the group; may not be imported by what is below it.
"""

from tpray.trace.model import ParallelModel
from tpray.trace.trace import (
    get_sharded_checkpoint,
    parallel_model_load,
    parallel_model_save,
    parallel_model_trace,
    shard_children,
)

__all__ = [
    "ParallelModel",
    "get_sharded_checkpoint",
    "parallel_model_load",
    "parallel_model_save",
    "parallel_model_trace",
    "shard_children",
]
