"""A rank's own retry while its cores are busy; see `tpray.platforms.busy` for what that is.

It is for calls that concern one rank alone, as the start of the runtime does. A call in which ranks meet, such as
``init_process_group``, counts its calls on every rank: one that repeats it alone never meets the others. Such a refusal
ends all ranks, and the group brings them up again; see `tpray.group.attempts`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from tpray.platforms.busy import BUSY_LIMIT_S, is_busy

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 4.0


def retry_busy(call: Callable[[], T], limit_s: float = BUSY_LIMIT_S) -> T:
    """``call()``, repeated while it raises that the cores are busy.

    The pauses double up to `LONGEST_PAUSE_S`, each with a jitter of half its length: ranks that were refused at the
    same moment must not try again at the same moment. No try begins after ``limit_s``. A rank's peers may be waiting
    for it meanwhile, so that the phase in which this is called needs a limit well above it.

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
