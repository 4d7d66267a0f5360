"""Registers the process group "xla". Source: torch_xla.distributed.xla_backend; PJRT variables of torch-neuronx."""

from __future__ import annotations

from typing import Any

import neuron_rules
import torch.distributed as dist
from neuron_rules import ENV, ProcessExchange, check_process_rank

exchange: ProcessExchange | None = None


def _process_group(store: Any, rank: int, world: int, timeout: Any) -> Any:
    global exchange
    check_process_rank(rank, world)
    # Rule: a multi-process group needs these before import (torch-neuronx's PJRT notes).
    if int(ENV["NEURON_PJRT_PROCESS_INDEX"]) != rank:
        raise RuntimeError(f"NEURON_PJRT_PROCESS_INDEX is {ENV['NEURON_PJRT_PROCESS_INDEX']} on rank {rank}")
    if ENV["NEURON_PJRT_PROCESSES_NUM_DEVICES"].split(",") != ["1"] * world:
        raise RuntimeError(f"NEURON_PJRT_PROCESSES_NUM_DEVICES is not one device for each of {world} processes")
    neuron_rules.nrt_init(rank, world)
    exchange = ProcessExchange(store, rank, world)
    return exchange.group


dist.Backend.register_backend("xla", _process_group, devices=["cpu"])
