"""The wheel of `make package`: complete, and it serves where there is no clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from packaging.metadata import Metadata
from packaging.specifiers import SpecifierSet

from tpray.version import __version__

ROOT = Path(__file__).parents[2]
PAIR = ("The company HuggingFace is based in New York City", "HuggingFace's headquarters are situated in Manhattan")
PIP = (sys.executable, "-m", "pip", "--quiet")

pytestmark = pytest.mark.slow


def own_environ() -> dict[str, str]:
    """Without what leads to the clone, or to the make that runs these tests."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in a copy of the sources, so that nothing is left of, or in, the clone's own folders."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "deployments/constraints.txt"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(ROOT / "tpray", clone / "tpray", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        ["make", "-C", str(clone), "package", f"PYTHON={sys.executable}"],
        capture_output=True, text=True, check=False, env=own_environ(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    made, archive = sorted((clone / "dist").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert archive.name.endswith(".tar.gz")
    return made


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Built out of the archive of sources, which so is complete too."""
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
        tree = [path for path in (ROOT / "tpray").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert names == {str(path.relative_to(ROOT)) for path in tree}
        for path in tree:
            assert archive.read(str(path.relative_to(ROOT))) == path.read_bytes(), path
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Metadata.from_email(archive.read(about), validate=True)
    tried = [line.rpartition(" ")[2] for line in metadata.classifiers or () if "Python :: 3." in line]
    assert tried
    assert all(f"{version}.0" in (metadata.requires_python or SpecifierSet()) for version in tried)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel. What tpray needs it takes from that of these tests, but not their tpray."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    subprocess.run([*PIP, "--python", str(folder), "install", "--no-deps", str(wheel)], check=True, env=own_environ())
    (packages,) = folder.glob("lib/python3*/site-packages")
    shared = [path for path in sys.path if path.endswith("-packages")]
    (packages / "of_the_tests.pth").write_text("\n".join(shared) + "\n")
    return folder


def run(environment: Path, empty: Path, *argv: str) -> str:
    done = subprocess.run(
        [environment / "bin" / argv[0], *argv[1:]],
        capture_output=True, text=True, check=False, env=own_environ(), cwd=empty,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_requirements_are_met_and_it_is_the_one_that_is_imported(environment: Path, tmp_path: Path) -> None:
    checked = subprocess.run(
        [*PIP, "--python", str(environment), "check"], capture_output=True, text=True, check=False, env=own_environ()
    )
    assert [line for line in checked.stdout.splitlines() if line.startswith("tpray ")] == [], checked.stderr
    where = run(environment, tmp_path, "python", "-c", "import tpray; print(tpray.__file__)").strip()
    assert Path(where).is_relative_to(environment)
    assert run(environment, tmp_path, "tpray", "--version").strip() == f"tpray {__version__}"


@pytest.mark.ray
def test_it_classifies_and_serves(environment: Path, tmp_path: Path, free_port: Callable[[], int]) -> None:
    (said,) = run(environment, tmp_path, "tpray", "classify", "--tp", "1", "--json", "--pair", *PAIR).splitlines()
    assert json.loads(said)["scores"][0]["label"] == "paraphrase"

    url = f"http://127.0.0.1:{free_port()}"
    log = tmp_path / "log"
    with log.open("w") as to:
        server = subprocess.Popen(
            [environment / "bin/tpray", "serve", "--tp", "2", "--port", url.rpartition(":")[2]],
            stdout=to, stderr=to, env=own_environ(), cwd=tmp_path,
        )  # fmt: skip
    try:
        give_up = time.monotonic() + 180
        while "Ready" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)
        scores = httpx.post(f"{url}/predict", json={"inputs": [PAIR]}, timeout=60).json()
        assert scores[0][0]["label"] == "paraphrase"
        httpx.get(f"{url}/health", timeout=60).raise_for_status()
        for page in ("/", "/docs"):
            shown = httpx.get(url + page, headers={"accept": "text/html"}, timeout=60).raise_for_status()
            assert shown.headers["content-type"].startswith("text/html")
            files = re.findall(r'(?:href|src)="(?!data:|#)([^"]+)"', shown.text)
            assert files, page
            for file in files:
                httpx.get(httpx.URL(url + page).join(file), timeout=60).raise_for_status()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]
