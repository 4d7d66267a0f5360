"""Disks that are full, and two processes that trace one model at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLASSIFY = [sys.executable, "-m", "tpray", "classify", "one text", "--json"]


def in_a_disk_of(size: str, folder: Path) -> list[str]:
    """A shell command that runs what follows it with a disk of so many bytes at ``folder``."""
    script = f'mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "-"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody mount a small disk")
    return command


def classify(prefix: list[str], *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command that classifies one text, behind another command, with these variables."""
    return subprocess.run(
        [*prefix, *CLASSIFY, *flags], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"COLUMNS": "300"} | variables,
    )  # fmt: skip


@pytest.mark.ray
def test_a_full_cache_is_said_before_ray_is_started(tmp_path: Path) -> None:
    done = classify(in_a_disk_of("1m", tmp_path), TPRAY_CACHE=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "must be traced, which takes" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.ray
def test_a_full_disk_of_rays_is_said_before_it_is_started(tmp_path: Path) -> None:
    # Of one rank, which is the command itself, Ray has no part.
    done = classify(
        in_a_disk_of("50m", tmp_path), "--tp", "2", RAY_TMPDIR=str(tmp_path), TPRAY_CACHE=str(tmp_path.parent)
    )
    assert done.returncode == 2, done.stderr
    assert "MiB left: free some, or set RAY_TMPDIR" in done.stderr


@pytest.mark.nightly
@pytest.mark.ray
def test_it_works_with_little_shared_memory_and_no_home(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environ["TPRAY_CACHE"] = str(tmp_path)
    done = subprocess.run(
        [*in_a_disk_of("8m", Path("/dev/shm")), *CLASSIFY, "--tp", "2"],
        capture_output=True, text=True, timeout=180, check=False, env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"label"' in done.stdout


@pytest.mark.nightly
@pytest.mark.ray
def test_two_that_trace_one_model_at_once_both_serve_it(tmp_path: Path) -> None:
    environ = os.environ | {"TPRAY_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen(
            [*CLASSIFY, "--tp", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert '"label"' in out
    (artifact,) = (tmp_path / "artifacts").glob("[!.]*")  # beside the lock
    assert (artifact / "manifest.json").is_file()
