"""Builds and runs an image without Docker: its Dockerfile's steps run in a folder made of layers. For Linux and root.

Known are the instructions that tpray's files use (https://docs.docker.com/reference/dockerfile/). What runs has mounts
and processes of its own, as with Docker, and the machine's network.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SHM = "64m"
"""The size of /dev/shm with Docker, unless `--shm-size` says otherwise."""

COMMANDS = {"ENTRYPOINT": "entrypoint", "CMD": "command", "HEALTHCHECK": "health"}
"""What has a command as a list, and where `Image` keeps it."""

MAKE = {True: "mkdir -p {0}", False: "[ -e {0} ] || touch {0}"}
"""What something is mounted over must be there: whether it is a folder, and the command."""


@dataclass(frozen=True)
class Image:
    """layers: folders, the newest first; the last is a whole system. binds: of this machine, as they are there."""

    layers: tuple[Path, ...]
    environ: Mapping[str, str]
    binds: tuple[Path, ...] = ()
    args: Mapping[str, str] = field(default_factory=dict)
    user: str = "0"
    folder: str = "/"
    volumes: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()


def steps_of(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction and what follows it."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def build(dockerfile: Path, context: Path, base: Image, work: Path, *, without: str | None = None) -> Image:
    """The image of the last stage.

    Args:
        context: what COPY takes from. base: takes the place of the image that the first stage is from.
        work: where layers are made. without: no RUN that has this word is run.
    """
    built: dict[str, Image] = {}
    image = base
    for word, rest in steps_of(dockerfile):
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            below = built.get(source, base)
            image = replace(below, layers=(work / f"layer{len(built)}", *below.layers))
            image.layers[0].mkdir()
        elif word == "COPY":
            _copy(rest, image, context, built)
        elif word == "RUN":
            if without is None or without not in rest:
                done = subprocess.run(
                    in_namespaces(image, ["/bin/sh", "-c", rest], work), capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        else:
            image = _set(image, word, rest)
        built[name] = image
    return image


def _copy(what: str, image: Image, context: Path, built: Mapping[str, Image]) -> None:
    *sources, target = what.split()
    origin = context
    if sources[0].startswith("--from="):
        origin = built[sources.pop(0).removeprefix("--from=")].layers[0]
    into = image.layers[0] / (Path(image.folder) / target).relative_to("/")
    into.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["cp", "--archive", *(str(origin / source.lstrip("/")) for source in sources), str(into)], check=True
    )


def _set(image: Image, word: str, value: str) -> Image:
    """An image with what an instruction says of it."""
    changed: dict[str, Any] = {}
    if word == "ARG":
        name, _, default = value.partition("=")
        changed["args"] = {name: default, **image.args}
    elif word == "ENV":
        pairs = (pair.partition("=") for pair in shlex.split(value))
        more = {name: given.replace("$PATH", image.environ["PATH"]) for name, _, given in pairs}
        changed["environ"] = {**image.environ, **more}
    elif word == "WORKDIR":
        (image.layers[0] / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        changed["folder"] = value
    elif word in COMMANDS:
        changed[COMMANDS[word]] = tuple(json.loads(value[value.index("[") :]))
    elif word == "VOLUME":
        changed["volumes"] = (*image.volumes, value)
    elif word == "USER":
        changed["user"] = value
    else:
        assert word == "EXPOSE", f"{word} is not known here"
    return replace(image, **changed)


def in_namespaces(image: Image, argv: Sequence[str], work: Path, *, run: bool = False, tmp: str = "exec") -> list[str]:
    """A command that runs ``argv`` in the image, as root with the newest layer to write to.

    Args:
        run: as with `docker run --read-only --tmpfs /tmp:exec`: as the image's user, and only volumes and /tmp are
            written. tmp: options of the mount there.
    """
    root = work / "root"
    root.mkdir(exist_ok=True)
    layers = [str(layer) for layer in image.layers]
    if run:
        overlay = f"lowerdir={':'.join(layers)}"
    else:
        (scratch := work / f"{image.layers[0].name}.work").mkdir(exist_ok=True)
        overlay = f"lowerdir={':'.join(layers[1:])},upperdir={layers[0]},workdir={scratch}"
    lines = [
        "set -e",
        "mount --make-rprivate /",
        f"mount -t overlay overlay -o {overlay} {root}",
        f"mount -t proc proc {root}/proc",
        *(f"mount --rbind {path} {root}{path}" for path in ("/dev", "/sys")),
        f"mount -t tmpfs -o size={SHM},mode=1777,nosuid,nodev,noexec shm {root}/dev/shm",
        f"mount -t tmpfs -o mode=1777,nosuid,nodev,{tmp} tmp {root}/tmp",
        *(f"{MAKE[path.is_dir()].format(f'{root}{path}')}; mount --bind {path} {root}{path}" for path in image.binds),
    ]
    if run:
        for volume in image.volumes:
            kept = work / "volumes" / volume.lstrip("/")
            if not kept.exists():  # as a new volume, it begins as that folder of the image
                kept.parent.mkdir(parents=True)
                subprocess.run(["cp", "--archive", str(image.layers[0] / volume.lstrip("/")), str(kept)], check=True)
            lines.append(f"mount --bind {kept} {root}{volume}")
    user = image.user if run else "0"
    given = image.environ if run else {**image.args, **image.environ}
    environ = [f"HOME={home_of(user, image)}", *variables(given)]
    chroot = ["chroot", f"--userspec={user}:{user}", str(root), "/usr/bin/env", "-i", "-C", image.folder, *environ]
    lines.append(f"exec {shlex.join([*chroot, *argv])}")
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", "\n".join(lines)]


def variables(environ: Mapping[str, str]) -> list[str]:
    """As env(1) takes them."""
    return [f"{name}={value}" for name, value in environ.items()]


def home_of(user: str, image: Image) -> str:
    """Of a user by his number: the variable HOME, which Docker sets."""
    newest = next(file for layer in image.layers if (file := layer / "etc/passwd").exists())
    return next(line.split(":")[5] for line in newest.read_text().splitlines() if line.split(":")[2] == user)


def inside(image: Image, first_pid: int, argv: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """As `docker exec`, in what runs with ``first_pid`` as its first process."""
    user = ["--setuid", image.user, "--setgid", image.user]
    return subprocess.run(
        ["nsenter", "--target", str(first_pid), "--mount", "--pid", "--root", *user,
         "/usr/bin/env", "-i", *variables(image.environ), *argv],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def context_of(root: Path, work: Path) -> Path:
    """What `.dockerignore` leaves of a clone, which is all that COPY can take."""
    context = work / "context"
    for line in (root / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source, target = root / line[1:], context / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    return context


def package_index() -> dict[str, str]:
    """How pip reaches its index on this machine."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def places_of_packages() -> tuple[Path, ...]:
    """What of this machine pip needs for that, beside the network."""
    named = (Path(os.environ.get(name, "")) for name in ("PIP_FIND_LINKS", "PIP_CERT"))
    return (Path("/etc/resolv.conf"), Path("/etc/hosts"), *(path for path in named if path.is_absolute()))


def this_machine(work: Path) -> Image:
    """This machine's own system, with the Python and packages of these tests, as the base of an image."""
    base = work / "base"
    own = (Path(sys.base_prefix), Path(sys.prefix))
    for parent in {parent for path in own for parent in path.parents}:  # /root is for root alone
        (base / parent.relative_to("/")).mkdir(parents=True, exist_ok=True, mode=0o755)
    path = f"{sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return Image((base, Path("/")), {"PATH": path}, own, package_index() | {"PIP_NO_DEPS": "1"})
