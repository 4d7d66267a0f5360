"""What tensor parallelism is: layers, their collectives, the plan that places them, their checkpoints.

Knows no Ray and no HTTP. Read `plan`, then `layers`, `collective`, `checkpoint`, `shard`.
"""
