"""`GQAQKVColumnParallelLinear`, under the name that neuronx-distributed has for its module."""

from tpray.parallel_layers.gqa import GQAQKVColumnParallelLinear

__all__ = ["GQAQKVColumnParallelLinear"]
