"""The one sharding table: a row for each architecture, by its ``config.model_type``.

A new architecture is a row in `encoders`, `encoder_decoders` or `decoders`; `common` has the rules that they share.
Where the table has no row, `upstream` derives a plan from the one that transformers states.
"""

from __future__ import annotations

from typing import Any

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures.decoders import DECODERS, VARIANTS
from tpray.parallel_layers.architectures.encoder_decoders import ENCODER_DECODERS
from tpray.parallel_layers.architectures.encoders import ENCODERS
from tpray.parallel_layers.plan import Plan

PLANS: dict[str, Plan] = ENCODERS | ENCODER_DECODERS | DECODERS


def plan_for(config: Any) -> Plan:
    """The plan of a transformers configuration: the table's, or one derived from transformers' own.

    Raises:
        UnsupportedModelError: there is neither, or the latter cannot be kept; the message says why.
    """
    model_type: str = config.model_type
    if model_type in PLANS:
        variants = VARIANTS.get(model_type, ())
        return next((variant.plan for variant in variants if variant.applies(config)), PLANS[model_type])
    from tpray.parallel_layers.architectures import upstream  # imports torch

    reason = upstream.why_not(config)
    if reason is not None:
        raise UnsupportedModelError(f"{model_type!r} {reason}: it cannot be served")
    plan = upstream.derive(config)
    if plan is None:
        raise UnsupportedModelError(
            f"no sharding plan for the architecture {model_type!r}: give one of your own (--plan FILE); tpray has "
            f"them for {', '.join(PLANS)}, and those that `tpray doctor --architectures` lists besides"
        )
    return plan
