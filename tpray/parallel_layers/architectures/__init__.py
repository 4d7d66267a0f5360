"""The one sharding table: a row for each architecture, by its ``config.model_type``.

A new architecture is a row in `encoders`, `encoder_decoders` or `decoders`; `common` has the rules that they share.
"""

from __future__ import annotations

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures.decoders import DECODERS
from tpray.parallel_layers.architectures.encoder_decoders import ENCODER_DECODERS
from tpray.parallel_layers.architectures.encoders import ENCODERS
from tpray.parallel_layers.plan import Plan

PLANS: dict[str, Plan] = ENCODERS | ENCODER_DECODERS | DECODERS


def plan_for(model_type: str) -> Plan:
    """The plan of an architecture, by its ``config.model_type``.

    Raises:
        UnsupportedModelError: the table has no row for it; the message lists those it has.
    """
    try:
        return PLANS[model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"no sharding plan for the architecture {model_type!r}: give one of your own (--plan FILE); tpray has "
            f"them for {', '.join(PLANS)}"
        ) from None
