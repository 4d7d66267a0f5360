"""Artifacts that are signed: what was not, or not with that key, or was changed since, is refused before it is used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tpray import load
from tpray.artifacts.folder import MODEL_DIR, rank_folder
from tpray.artifacts.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from tpray.artifacts.settle import settle
from tpray.artifacts.signature import check_signature, sign
from tpray.artifacts.store import SIGNATURE_FILE, SharedStore
from tpray.commands.cli import app
from tpray.config import ModelConfig, ServeConfig
from tpray.errors import ArtifactError, ConfigError, StoreError
from tpray.group.thread_executor import ThreadExecutor

WEIGHTS = f"{rank_folder(0)}/weights.safetensors"


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)


class Keys:
    """A pair that OpenSSL makes, as the documentation says."""

    def __init__(self, folder: Path, name: str, algorithm: str = "ed25519") -> None:
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}-public.pem"
        assert openssl("genpkey", "-algorithm", algorithm, "-out", self.private).returncode == 0
        assert openssl("pkey", "-in", self.private, "-pubout", "-out", self.public).returncode == 0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), "own")


@pytest.fixture(scope="module")
def traced(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that is not signed."""
    out = tmp_path_factory.mktemp("traced") / "artifact"
    load(str(make_checkpoint("bert")), tp=2, dtype="float32", out=out, executor=ThreadExecutor(2)).close()
    return out


@pytest.fixture
def artifact(traced: Path, keys: Keys, tmp_path: Path) -> Path:
    """A copy of it that is signed."""
    copy = tmp_path / "artifact"
    shutil.copytree(traced, copy)
    sign(copy, keys.private)
    return copy


def answers(model: str | Path, key: Path) -> bool:
    with load(str(model), tp=2, executor=ThreadExecutor(2), verify_key=key) as classifier:
        return len(classifier.classify("a b")) > 0


def test_what_is_signed_is_used_and_openssl_agrees(artifact: Path, keys: Keys) -> None:
    manifest, signature = artifact / MANIFEST_FILE, artifact / SIGNATURE_FILE
    said = openssl(
        "pkeyutl", "-verify", "-pubin", "-inkey", keys.public, "-rawin", "-in", manifest, "-sigfile", signature
    )
    assert said.returncode == 0, said.stderr
    assert answers(artifact, keys.public)


def _unsigned(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).unlink()


def _cut(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).write_bytes((artifact / SIGNATURE_FILE).read_bytes()[:-1])


def _other_model(artifact: Path) -> None:
    """All hashes agree again: whoever changes a file can do that."""
    manifest = read_manifest(artifact, Manifest)
    write_manifest(artifact, manifest.model_copy(update={"created": "2000-01-01T00:00:00+00:00"}))


def _one_more_file(artifact: Path) -> None:
    """transformers would read it: no file of a tokenizer need be named anywhere."""
    (artifact / MODEL_DIR / "added_tokens.json").write_text("{}")


def _linked_folder(artifact: Path) -> None:
    (artifact / MODEL_DIR / "more").symlink_to("/tmp", target_is_directory=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_unsigned, "is not signed: it has no manifest.sig"),
        (_cut, "is not signed with the key that"),
        (_other_model, "is not signed with the key that"),
        (_one_more_file, "added_tokens.json is not named by the manifest"),
        (_linked_folder, "more is not named by the manifest"),
    ],
)
def test_what_was_not_signed_so_is_refused_before_anything_is_read(
    change: Callable[[Path], None], words: str, artifact: Path, keys: Keys
) -> None:
    change(artifact)
    model = ModelConfig(source=str(artifact), verify_key=keys.public)
    with pytest.raises(ArtifactError, match=words):
        settle(ServeConfig(model=model))
    with pytest.raises(ArtifactError, match=words):
        load(str(artifact), tp=2, executor=ThreadExecutor(2), verify_key=keys.public)


def test_a_changed_file_is_found_by_its_hash(artifact: Path, keys: Keys) -> None:
    weights = artifact / WEIGHTS
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged or was changed"):
        answers(artifact, keys.public)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged or was changed"):
        sign(artifact, keys.private)


def test_another_key_and_what_is_no_key_are_refused(artifact: Path, keys: Keys, tmp_path: Path) -> None:
    other, rsa = Keys(tmp_path, "other"), Keys(tmp_path, "rsa", "RSA")
    with pytest.raises(ArtifactError, match=r"not signed with the key that .*other-public\.pem belongs to"):
        check_signature(artifact, other.public)
    for wrong, words in (
        (keys.private, "is no public key in PEM"),
        (rsa.public, "of another kind than Ed25519"),
        (tmp_path / "none", "cannot be read (No such file or directory)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            check_signature(artifact, wrong)
    for wrong, words in ((keys.public, "is no private key"), (rsa.private, "of another kind than Ed25519")):
        with pytest.raises(ConfigError, match=re.escape(words)):
            sign(artifact, wrong)


def test_a_checkpoint_has_no_signature(make_checkpoint: Callable[..., Path], keys: Keys) -> None:
    with pytest.raises(ConfigError, match="is a checkpoint, and --verify-key takes only what is signed"):
        load(str(make_checkpoint("bert")), tp=1, executor=ThreadExecutor(1), verify_key=keys.public)


def test_the_command_signs_here_and_in_the_store(
    make_checkpoint: Callable[..., Path], keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpray.commands import loading

    def load_on_threads(model: str | None, **options: object) -> object:
        return load(model, executor=ThreadExecutor(1), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_with_progress", load_on_threads)
    store = f"file://{tmp_path}/store"
    checkpoint = str(make_checkpoint("bert"))
    asked = ["trace", checkpoint, "--tp", "1", "--dtype", "float32", "--store", store]
    unsigned = CliRunner().invoke(app, asked)
    assert unsigned.exit_code == 0, unsigned.output
    url = unsigned.stdout.split()[-1]
    model = ModelConfig(source=url, verify_key=keys.public)
    with pytest.raises(ArtifactError, match="is not signed"):
        settle(ServeConfig(model=model))
    signed = CliRunner().invoke(app, [*asked, "--sign-key", str(keys.private)])
    assert signed.exit_code == 0, signed.output
    assert signed.stdout.split()[-1] == url
    assert settle(ServeConfig(model=model)).topology.tp == 1, "what was fetched without a signature is fetched again"
    assert SharedStore(store).has(url.rpartition("/")[2])
    assert json.loads((tmp_path / "store" / url.rpartition("/")[2] / MANIFEST_FILE).read_text())["tp"] == 1
    with load(url, tp=1, executor=ThreadExecutor(1), verify_key=keys.public) as classifier:
        assert classifier.classify("a b")


def test_what_a_store_held_already_is_not_signed(traced: Path, keys: Keys, tmp_path: Path) -> None:
    """Whoever writes to it could have put it there, with a canary that agrees."""
    store = SharedStore(f"file://{tmp_path}/store")
    store.publish(traced, "key")
    fetched = tmp_path / "cache" / "key"
    assert store.fetch("key", fetched)
    with pytest.raises(ArtifactError, match="was fetched from a store, and a signature is for what this machine has"):
        sign(fetched, keys.private, store.url_of("key"))


def test_a_signature_is_not_put_beside_another_trace(artifact: Path, keys: Keys, tmp_path: Path) -> None:
    store = SharedStore(f"file://{tmp_path}/store")
    store.publish(artifact, "key")
    _other_model(artifact)
    with pytest.raises(StoreError, match="is another trace of this model, and not signed"):
        sign(artifact, keys.private, store.url_of("key"))
    check_signature(tmp_path / "store" / "key", keys.public)
