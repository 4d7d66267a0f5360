"""The certificate of a server on this machine: looked at before it is used, and used again when it is renewed.

HAProxy speaks TLS; it wants the certificate and its key in one file, and takes another over its socket while it runs.

Source: https://docs.haproxy.org/2.8/management.html (set ssl cert, commit ssl cert).
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from pathlib import Path

from tpray.config import TlsConfig
from tpray.errors import ConfigError

log = logging.getLogger(__name__)


def check(files: TlsConfig) -> bytes:
    """What HAProxy gets: certificates and key, in PEM.

    Raises:
        ConfigError: a file cannot be read, they do not belong together, or a client would not take the certificate.
    """
    cert, key = files.cert.expanduser(), files.key.expanduser()
    parts = []
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            parts.append(path.read_bytes())
        except OSError as e:
            raise ConfigError(f"{flag} {path} cannot be read ({e.strerror or e})") from e
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(cert, key, password="")
    except ssl.SSLError as e:
        if e.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"the key in {key} is not that of the certificate in {cert}, which comes first there: give its own"
            ) from e
        raise ConfigError(
            f"{cert} and {key} are no certificate and key ({e.reason or e}): give PEM files, the key without a password"
        ) from e
    try:
        _shake_hands(server, trusting(files))
    except ssl.SSLCertVerificationError as e:
        raise ConfigError(
            f"clients refuse the certificate in {cert} ({e.verify_message}): give one that is valid"
        ) from e
    except ssl.SSLError as e:
        raise ConfigError(f"clients cannot use the certificate in {cert} ({e.reason or e}): give another one") from e
    return b"\n".join(line for part in parts for line in part.splitlines() if line.strip()) + b"\n"


def trusting(files: TlsConfig) -> ssl.SSLContext:
    """What a client needs that is to trust this certificate, whoever signed it and whatever host it names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.cert.expanduser())
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate is itself what is trusted
    return context


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Have the two agree, in memory.

    Raises:
        ssl.SSLError: they do not, as where the certificate has expired.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


class Certificate:
    """The certificate of a running server, in a file in its folder that only its user can read."""

    NAME = "certificate.pem"

    def __init__(self, files: TlsConfig, folder: Path) -> None:
        self._files, self._folder = files, folder
        self.path = folder / self.NAME
        self._seen = self._stamps()
        self._write(check(files))

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path.expanduser()) for path in (self._files.cert, self._files.key)]

    def _write(self, pem: bytes) -> None:
        partial = self.path.with_suffix(".part")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
        partial.replace(self.path)

    def renew(self) -> None:
        """Have HAProxy use the files as they are now, if they have changed; what is broken changes nothing."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            pem = check(self._files)
            self._write(pem)  # for a HAProxy that starts later
        except (ConfigError, OSError) as e:
            # Of a certificate and its key one is written first, so that this may be over in a moment.
            log.warning("the certificate stays as it was: %s", e)
            self._seen = stamps
            return
        try:
            for admin in self._folder.rglob("admin.sock"):
                self._tell(admin, pem)
        except OSError as e:  # it starts just now, or is busy: the next call tries again
            log.warning("the certificate in %s has changed, and is not in use yet: %s", self._files.cert, e)
            return
        log.warning("the certificate in %s has changed, and is in use", self._files.cert)
        self._seen = stamps

    def _tell(self, admin: Path, pem: bytes) -> None:
        name = str(self.path).encode()
        for command in (b"set ssl cert %s <<\n%s\n" % (name, pem), b"commit ssl cert %s\n" % name):
            with socket.socket(socket.AF_UNIX) as haproxy:
                haproxy.settimeout(5)
                haproxy.connect(str(admin))
                haproxy.sendall(command)
                answer = b"".join(iter(lambda: haproxy.recv(4096), b"")).decode(errors="replace").strip()
            if not ("ransaction" in answer or "Success!" in answer):
                raise OSError(f"HAProxy does not take it: {answer}")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
