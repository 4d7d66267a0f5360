"""A process that goes from one Ray to the next: as a notebook does, after the server that it asked has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

OTHER = """
from tpray.local_ray.local import connected_to, start_ray, stop_ray
start_ray(1)
print(connected_to(), flush=True)
input()
stop_ray()
"""

OWN = """
import subprocess, sys, threading
import ray
from tpray.local_ray.local import connected_to, ensure_ray, join_ray, leave_ray, stop_ray

other = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
address = other.stdout.readline().strip()
join_ray(address)
assert connected_to() == address
assert not ensure_ray(1), "that one runs"
other.communicate("\\n")
if sys.argv[2] == "noticed":
    leaving = threading.Thread(target=leave_ray, args=(address,))  # as the thread does that waits for a server's end
    leaving.start()
assert ensure_ray(1), "that one has ended"
assert connected_to() != address
leave_ray(address)  # late: this process has another one now
print(ray.get(ray.put(7)))
stop_ray()
"""


@pytest.mark.parametrize("end", ["noticed", "not noticed"])
def test_a_ray_that_has_ended_is_left_before_the_next_one_is_started(end: str) -> None:
    """Two threads that end a connection and make one crash the process, and what is gone would be waited for."""
    done = subprocess.run(
        [sys.executable, "-c", OWN, OTHER, end], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
