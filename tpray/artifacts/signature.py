"""Artifacts that are signed: who holds the private key vouches for all that is in one.

A manifest has the hash of every file. Its signature, Ed25519 over the bytes of ``manifest.json``, is ``manifest.sig``
beside it, so that OpenSSL makes the keys and checks the signature too::

    openssl genpkey -algorithm ed25519 -out sign.pem && openssl pkey -in sign.pem -pubout -out verify.pem
    openssl pkeyutl -verify -pubin -inkey verify.pem -rawin -in manifest.json -sigfile manifest.sig

Who asks for a signature takes nothing else: no checkpoint, and no file that the manifest does not name.

Source: RFC 8032; https://cryptography.io/en/latest/hazmat/primitives/asymmetric/ed25519/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpray.artifacts.folder import MODEL_DIR, Artifact, is_artifact, rank_folder
from tpray.artifacts.manifest import MANIFEST_FILE, Manifest, read_manifest
from tpray.artifacts.store import SIGNATURE_FILE, has_file, put_file, was_fetched
from tpray.errors import ArtifactError, ConfigError, StoreError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_PRIVATE = "`openssl genpkey -algorithm ed25519 -out sign.pem` makes one"
_PUBLIC = "`openssl pkey -in sign.pem -pubout -out verify.pem` gives that of a private key"


def check_signature(directory: Path, key_file: Path | None) -> None:
    """Refuse what is not an artifact that ``key_file`` vouches for; nothing of it but its manifest is read.

    The files' contents are compared with their hashes where they are read.

    Args:
        key_file: the public key, in PEM; None: nothing need be signed.

    Raises:
        ArtifactError: it is not signed, not with that key, or has other files than its manifest names.
        ConfigError: the key cannot be read; or it is no artifact.
    """
    if key_file is None:
        return
    from cryptography.exceptions import InvalidSignature

    key = _read_public(key_file)
    if not is_artifact(directory):
        raise ConfigError(
            f"{directory} is a checkpoint, and --verify-key takes only what is signed: trace it with --sign-key, and "
            "name the artifact"
        )
    try:
        signature = (directory / SIGNATURE_FILE).read_bytes()
    except OSError as e:
        raise ArtifactError(f"{directory} is not signed: it has no {SIGNATURE_FILE} that can be read") from e
    try:
        key.verify(signature, (directory / MANIFEST_FILE).read_bytes())
    except InvalidSignature as e:
        raise ArtifactError(
            f"{directory} is not signed with the key that {key_file} belongs to, or was changed afterwards"
        ) from e
    _refuse_others(directory, read_manifest(directory, Manifest))


def sign(directory: Path, key_file: Path, url: str | None = None) -> None:
    """Sign an artifact that was traced here, once all its files are those of its manifest.

    A store's would be signed unseen: its canary agrees with it, whoever made it.

    Args:
        key_file: the private key, in PEM.
        url: where a store has the same artifact; the signature goes there too.

    Raises:
        ArtifactError: it is a store's; or a file is damaged, missing or one too many.
        ConfigError: the key cannot be read.
        StoreError: the store cannot be written, or has another artifact there.
    """
    if was_fetched(directory):
        raise ArtifactError(
            f"{directory} was fetched from a store, and a signature is for what this machine has traced: name a folder "
            "with --out, where it is traced anew"
        )
    key, artifact = read_private(key_file), Artifact.open(directory)
    _refuse_others(directory, artifact.manifest)
    for rank in range(artifact.manifest.tp):
        artifact.check_rank(rank)
    if url is not None and not has_file(directory / MANIFEST_FILE, url):
        raise StoreError(
            f"{url} is another trace of this model, and not signed: remove it there, or give the store another name"
        )
    path = directory / SIGNATURE_FILE
    path.write_bytes(key.sign((directory / MANIFEST_FILE).read_bytes()))
    if url is not None:
        put_file(path, url)


def read_private(key_file: Path) -> Ed25519PrivateKey:
    """The key to sign with.

    Raises:
        ConfigError: the file has none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(key_file, "--sign-key"), None)
    except (ValueError, TypeError) as e:  # TypeError: it has a password
        raise ConfigError(f"--sign-key {key_file} is no private key without a password, in PEM: {_PRIVATE}") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"--sign-key {key_file} is a key of another kind than Ed25519: {_PRIVATE}")
    return key


def _read_public(key_file: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(key_file, "--verify-key"))
    except ValueError as e:
        raise ConfigError(f"--verify-key {key_file} is no public key in PEM: {_PUBLIC}") from e
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"--verify-key {key_file} is a key of another kind than Ed25519: {_PUBLIC}")
    return key


def _read(key_file: Path, flag: str) -> bytes:
    try:
        return key_file.expanduser().read_bytes()
    except OSError as e:
        raise ConfigError(f"{flag} {key_file} cannot be read ({e.strerror or e})") from e


def _refuse_others(directory: Path, manifest: Manifest) -> None:
    """transformers reads what lies beside a tokenizer, whether or not a manifest names it."""
    named = {f"{MODEL_DIR}/{name}" for name in manifest.model_files} | {MANIFEST_FILE, SIGNATURE_FILE}
    named |= {f"{rank_folder(rank)}/{name}" for rank, record in enumerate(manifest.ranks) for name in record.files}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    links = [path for path in directory.rglob("*") if path.is_symlink() and path.is_dir()]
    if links or (others := sorted(found - named)):
        which = links[0] if links else directory / others[0]
        raise ArtifactError(f"{which} is not named by the manifest: remove it, or trace the model again")
