"""On PYTHONPATH in one test: Ray's autoscaler, a process of its own, takes 127.0.0.1 for this machine's address."""

import sys

if any(argument.endswith("monitor.py") for argument in sys.orig_argv):
    from tpray.group.cluster import _stay_on_loopback

    _stay_on_loopback()
