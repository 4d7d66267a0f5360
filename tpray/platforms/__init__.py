"""What each kind of core needs before any process starts: detection, resources, degrees, environment.

Here live one file for each kind of core, `topology` (how a group lies on its cores), `memory` and
`lease` (claims on cores and ports). No torch, no Ray, no
processes: a platform says what a rank will need, and the runtime of the same name, in the rank, uses it.
"""

from __future__ import annotations

from tpray.config import AUTO
from tpray.errors import ConfigError
from tpray.platforms.base import Platform
from tpray.platforms.cpu import CpuPlatform
from tpray.platforms.neuron import NEURON, NEURON_XLA

PLATFORMS: dict[str, Platform] = {platform.name: platform for platform in (NEURON, NEURON_XLA, CpuPlatform())}
"""By the name of the runtime. ``auto`` is the first that this machine has; the CPU, the last, is everywhere."""


def platform_for(name: str) -> Platform:
    """The platform of the runtime called ``name``; ``auto`` is the first that this machine has.

    Raises:
        ConfigError: there is no such runtime.
    """
    if name == AUTO:
        return next(platform for platform in PLATFORMS.values() if platform.is_here())
    if name not in PLATFORMS:
        known = ", ".join([AUTO, *sorted(PLATFORMS)])
        raise ConfigError(
            f"there is no runtime {name!r}: use one of {known}; tpray runs on CPU cores and on AWS NeuronCores, and "
            "serves no GPUs or TPUs"
        )
    return PLATFORMS[name]
