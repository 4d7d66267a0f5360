"""What tensor parallelism is: layers, their collectives, the plan that places them, their checkpoints.

Knows no Ray and no HTTP. Read `plan`, then `layers`, `collective`, `checkpoint`, `shard`, `sharded`.
"""

from tpray.parallel_layers.sharded import load, merge, save

__all__ = ["load", "merge", "save"]
