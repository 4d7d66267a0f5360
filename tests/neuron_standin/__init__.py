"""Stand-ins for Neuron's packages: the same names and signatures, strict about their use, computing on the CPU.

``torchneuron`` and ``xla`` are the two stacks, one of which goes on PYTHONPATH with ``shared``; ``bin`` has the tools.
"""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent
STACKS = {"neuron": "torchneuron", "neuron-xla": "xla"}


def environment(runtime: str, claims: Path, device: Path) -> dict[str, str]:
    """What a process needs to find ``runtime``'s stand-in. claims: where cores are taken; device: see `build`."""
    paths = [str(HERE / STACKS[runtime]), str(HERE / "shared"), str(HERE.parents[1])]
    return {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(HERE / "bin"), os.environ["PATH"]]),
        "RAY_OVERRIDE_RESOURCES": '{"neuron_cores": 8}',  # what Ray's autoscaler tells a node that it started
        "NEURON_STANDIN_DIR": str(claims),
        "NEURON_STANDIN_DEVICE": str(device),
    }
