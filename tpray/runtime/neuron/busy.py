"""Cores that are busy for a moment, and the retry that waits for them.

Two processes that take cores of one device within milliseconds can both be refused ("cores busy, ret=-16"), and the
cores of a process that was killed are free only when the driver has cleaned up behind it. Both pass by themselves.

What can be recognised is words. The runtime writes the true reason to its log on stderr::

    NRT:nrt_allocate_neuron_cores  Logical Neuron Core(s) not available - Requested:lnc0-lnc0 Available:0 ... (cores
    busy, ret=-16)

The exception has them too or, in torch-neuronx, only says that the runtime "could not be initialized", which a driver
that is absent also does: that error then comes `BUSY_LIMIT_S` later than it could.

Sources: aws-neuron-sdk issue 1338 and its troubleshooting pages for the words; nrt_status.h for the status codes;
reports of third parties for -16 when processes start at once, and for a core that is held for a process's whole life.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

BUSY_LIMIT_S = 60.0
"""How long busy cores are waited for: those of a killed process have been seen to stay so for more than 10 s."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 4.0

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


def retry_busy(call: Callable[[], T], limit_s: float = BUSY_LIMIT_S) -> T:
    """``call()``, repeated while it raises that the cores are busy.

    The pauses double up to `LONGEST_PAUSE_S`, each with a jitter of half its length: ranks that were refused at the
    same moment must not try again at the same moment. No try begins after ``limit_s``, and a rank's peers, which may be
    waiting for it in a collective, must be given at least so long.

    Raises:
        Exception: whatever ``call`` raises for another reason, at once; and the last refusal, after ``limit_s``.
    """
    give_up, pause_s, tries = time.monotonic() + limit_s, FIRST_PAUSE_S, 1
    while True:
        try:
            return call()
        except Exception as e:
            wait_s = pause_s * random.uniform(0.5, 1.5)
            if not is_busy(e) or time.monotonic() + wait_s > give_up:
                raise
            if tries == 1:
                log.warning("the cores are busy, and are tried again for up to %.0f s: %s", limit_s, e)
        time.sleep(wait_s)  # outside of the handler: what the refused call has made is let go of first
        pause_s, tries = min(2 * pause_s, LONGEST_PAUSE_S), tries + 1
