"""NeuronCores that another process has: how their runtime says so, and for how long that may pass by itself.

Two processes that take cores of one device within milliseconds can both be refused ("cores busy, ret=-16"), and the
cores of a process that was killed are free only when the driver has cleaned up behind it.

What can be recognised is words. The runtime writes the true reason to its log on stderr::

    NRT:nrt_allocate_neuron_cores  Logical Neuron Core(s) not available - Requested:lnc0-lnc0 Available:0 ... (cores
    busy, ret=-16)

The exception has them too or, in torch-neuronx, only says that the runtime "could not be initialized", which a driver
that is absent also does: that error then comes `BUSY_LIMIT_S` later than it could.

Sources: aws-neuron-sdk issue 1338 and its troubleshooting pages for the words; nrt_status.h for the status codes;
reports of third parties for -16 when processes start at once, and for a core that is held for a process's whole life.
"""

from __future__ import annotations

import re

BUSY_LIMIT_S = 60.0
"""How long busy cores are waited for: those of a killed process have been seen to stay so for more than 10 s."""

_BUSY = re.compile(
    r"Neuron ?Core\(s\) not available"  # nrt_allocate_neuron_cores; also "NeuronCore(s)", the older form
    r"|nrt_allocate_neuron_cores"
    r"|cores busy"
    r"|Neuron Runtime could not be initialized"  # torch-neuronx, whatever the reason
    r"|NRT_\w+ in nrt_init\b"  # TorchNeuron: "NRT_FAILURE in nrt_init()"
    r"|nrt_init failed"
    r"|NRT_EXEC_NC_BUSY|status=1005\b",
    re.IGNORECASE,
)


def is_busy(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, says that another process has the cores."""
    found: BaseException | None = error
    while found is not None:
        if _BUSY.search(str(found)):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False
