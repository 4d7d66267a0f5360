"""The images of `deployments/`: linted, in agreement with the other files, and, as far as goes without Docker, run.

The base image is played by this machine's own system, or with `make test-image` by a small Debian.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.package.docker_steps import (
    Image,
    build,
    context_of,
    in_namespaces,
    inside,
    package_index,
    places_of_packages,
    steps_of,
    this_machine,
)
from tests.served import assert_all_gone, children_of

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "deployments" / name for name in ("Dockerfile", "Dockerfile.neuron")]
KEY = "a-key-0123456789"
NO_KEY = "--host 0.0.0.0 lets others on the network ask, and there is no key: give --api-keys FILE or TPRAY_API_KEY"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_both_images_start_and_are_looked_after_alike() -> None:
    for word in ("USER", "ENTRYPOINT", "CMD", "EXPOSE", "VOLUME"):
        assert [rest for step, rest in steps_of(FILES[0]) if step == word] == [
            rest for step, rest in steps_of(FILES[1]) if step == word
        ]
    checks = [rest.partition(" CMD ")[2] for file in FILES for step, rest in steps_of(file) if step == "HEALTHCHECK"]
    assert checks[0] == checks[1]


def test_the_images_have_the_versions_that_were_tested() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "deployments/constraints.txt").read_text(), re.MULTILINE))
    cpu, neuron = (file.read_text() for file in FILES)
    assert f"torch=={pins['torch']}+cpu" in cpu
    assert f"torch=={pins['torch']}\n" in (ROOT / "Makefile").read_text()
    assert f"'ray[serve]=={pins['ray']}' 'transformers=={pins['transformers']}'" in neuron
    kuberay = (ROOT / "deployments/kuberay-rayservice.yaml").read_text()
    assert f'rayVersion: "{pins["ray"]}"' in kuberay
    name, tag = re.findall(r"image: (REGISTRY/[\w-]+):(\S+)", kuberay)[0]
    assert f"-t {name}:{tag} ." in neuron
    assert neuron.split("FROM ")[1].split()[0].rpartition("/")[2] in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A folder for layers: not on the disk that they lie over, which the kernel would refuse."""
    if os.geteuid() != 0:
        pytest.skip("only root can build an image without Docker")
    folder = Path(tempfile.mkdtemp(prefix="tpray-image-", dir="/dev/shm"))
    folder.chmod(0o755)
    try:
        tried = subprocess.run(
            in_namespaces(this_machine(folder), ["true"], folder), capture_output=True, text=True, check=False
        )
        if tried.returncode != 0:
            pytest.skip(f"this machine does not let root mount folders over its own: {tried.stderr.strip()}")
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(work: Path) -> Image:
    """`deployments/Dockerfile` on this machine's system; torch and what else tpray needs are those of these tests."""
    made = build(FILES[0], context_of(ROOT, work), this_machine(work), work, without="torch==")
    shared = [path for path in sys.path if path.endswith("-packages")]
    (packages,) = (made.layers[0] / "opt/tpray/lib").glob("python3*/site-packages")
    (packages / "of_the_tests.pth").write_text("\n".join(shared) + "\n")
    return made


@pytest.mark.slow
@pytest.mark.ray
def test_the_image_serves_as_a_user_without_rights(image: Image, work: Path, free_port: Callable[[], int]) -> None:
    serves(image, work, free_port())


@pytest.fixture(scope="module")
def small_debian(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """As `python:3.11-slim-bookworm`: the smallest Debian, with this machine's Python in /usr/local."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("only root, with Debian's debootstrap, can make a small Debian")
    base = tmp_path_factory.mktemp("debian")
    base.chmod(0o755)
    libraries = "ca-certificates,libbz2-1.0,libffi8,liblzma5,libreadline8,libsqlite3-0,libssl3,zlib1g"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={libraries}", "bookworm", str(base)],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(["cp", "--archive", f"{sys.base_prefix}/.", str(base / "usr/local")], check=True)
    pip = base / "usr/local/bin/pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    (base / "usr/local/bin/python").unlink(missing_ok=True)
    (base / "usr/local/bin/python").symlink_to("python3")
    subprocess.run(["chroot", str(base), "/sbin/ldconfig"], check=True)
    path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    return Image((base,), {"PATH": path}, places_of_packages(), package_index())


@pytest.mark.image
@pytest.mark.slow
@pytest.mark.ray
def test_every_step_on_a_small_debian(small_debian: Image, tmp_path: Path, free_port: Callable[[], int]) -> None:
    made = build(FILES[0], context_of(ROOT, tmp_path), small_debian, tmp_path)
    tools = inside_once(made, tmp_path, "which gcc cc make g++ pip; ls /opt/tpray/bin")
    assert not {"/usr/bin/gcc", "/usr/bin/cc", "/usr/bin/make", "/usr/bin/g++", "pip"} & set(tools)
    serves(made, tmp_path, free_port())
    size = subprocess.run(["du", "-sm", str(made.layers[0])], capture_output=True, text=True, check=True)
    print(f"What is added to the base image: {size.stdout.split()[0]} MB")


def inside_once(image: Image, work: Path, script: str) -> list[str]:
    argv = in_namespaces(image, ["/bin/sh", "-c", script], work, run=True)
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()


def first_process(running: subprocess.Popen[bytes]) -> int:
    """What is the container's first process, by its number on this machine."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up and running.poll() is None:
        for pid in children_of(running.pid):
            if Path(f"/proc/{pid}/comm").read_text() == "tini\n":
                return pid
        time.sleep(0.05)
    raise AssertionError("tini did not start")


def serves(image: Image, work: Path, port: int) -> None:
    """Run the image's own command, on a read-only root; ask; check its health; end it as `docker stop` does."""
    image = replace(image, environ={**image.environ, "TPRAY_PORT": str(port)})
    keyed = replace(image, environ={**image.environ, "TPRAY_API_KEY": KEY, "COLUMNS": "200"})
    started = [*image.entrypoint, *image.command]
    for what, tmp, words in ((image, "exec", NO_KEY), (keyed, "noexec", "so that no program in it is run (noexec)")):
        argv = in_namespaces(what, started, work, run=True, tmp=tmp)
        refused = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert refused.returncode == 2, refused.stderr
        assert words in " ".join(refused.stderr.split())

    log = work / "log"
    with log.open("w") as to:
        running = subprocess.Popen(in_namespaces(keyed, started, work, run=True), stdout=to, stderr=to)
    try:
        first = first_process(running)
        assert inside(image, first, image.health).returncode != 0, "nothing listens yet"
        give_up = time.monotonic() + 180
        while "Ready" not in log.read_text():
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)
        family = children_of(running.pid)
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in family} == {int(image.user)}

        healthy = inside(image, first, image.health)
        assert healthy.returncode == 0, healthy.stderr
        url = f"http://127.0.0.1:{port}/predict"
        assert httpx.post(url, json={"inputs": "Apples"}, timeout=60).status_code == 401
        answer = httpx.post(url, json={"inputs": "Apples"}, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert any((work / "volumes/home/tpray/.cache/tpray/artifacts").iterdir())
        os.kill(first, signal.SIGTERM)
        assert running.wait(60) == 0, log.read_text()
        assert_all_gone(family, within_s=0)
        assert "Traceback" not in log.read_text()
    finally:
        running.kill()
        running.wait()
