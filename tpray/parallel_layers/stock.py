"""transformers' own classifiers as they are, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import nn

from tpray.parallel_layers.tasks import auto_class


def empty_model(config: Any, attention: str = "sdpa") -> Any:
    """The stock classifier of this configuration on the meta device. attention: sdpa is fused, where it has that.

    BigBird's attention is the full one from the start: transformers changes to it when it sees a row that is short
    enough, and `Plan.max_length` allows no others.
    """
    make = auto_class(config).from_config
    config = copy(config)  # LiLT changes it while it is built, and ranks that are threads share it
    if getattr(config, "attention_type", None) == "block_sparse":
        config.attention_type = "original_full"
    with torch.device("meta"):
        try:
            return make(config, attn_implementation=attention).eval()
        except ValueError:  # says transformers of an architecture without it
            return make(config, attn_implementation="eager").eval()


def paths_to_decide(model: nn.Module) -> Iterator[str]:
    """What a plan must have a rule for: every layer with parameters, and a parameter whose module has layers too."""
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own and any(True for _ in module.children()):
            yield from (f"{path}.{name}" for name in own)
        elif own:
            yield path


def scale_of(table: Any) -> float | None:
    """What an embedding multiplies by what it looks up, under the names that transformers has for it; None: nothing."""
    found = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    return float(found) if isinstance(found, (int, float)) else None
