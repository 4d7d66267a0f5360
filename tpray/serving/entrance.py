"""Where HTTP and gRPC come into a server on this machine: addresses, who may reach them, and what HAProxy says."""

from __future__ import annotations

import hashlib
import logging
import secrets
import socket
import ssl
from http import HTTPStatus
from pathlib import Path

from tpray.config import AccessConfig, TlsConfig
from tpray.errors import ConfigError, DeadlineError, GroupError, InputError, TprayError
from tpray.serving import haproxy, tls
from tpray.serving.access import check_host, on_loopback
from tpray.serving.haproxy_start import LOOPBACK
from tpray.serving.keys import KeyRing

log = logging.getLogger(__name__)


class Entrance:
    """An address, and the certificate that is shown there.

    Args:
        files: of the certificate; None: HTTP is not encrypted.
        grpc_port: of gRPC, at the same host; None: there is none.
    """

    def __init__(self, host: str, port: int, files: TlsConfig | None = None, grpc_port: int | None = None) -> None:
        self.host, self.port, self._files, self.grpc_port = host, port, files, grpc_port
        self.url = f"{'http' if files is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
        self.token = secrets.token_hex(16)
        """What HAProxy shows the replicas; see `tpray.serving.gate`."""
        self.key = secrets.token_hex(32)
        """With which this process asks its own server."""
        self.key_names: tuple[str, ...] = ()
        """The names of the keys that others may ask with, once `check` has looked; none: no key is asked for."""
        self._certificate: tls.Certificate | None = None
        self._keys = KeyRing()

    @property
    def serve_host(self) -> str:
        """Where Serve is to listen: behind HAProxy on loopback, else where clients ask."""
        return LOOPBACK if haproxy.is_used() else self.host

    @property
    def context(self) -> ssl.SSLContext | None:
        """With which this process asks its own server, by an address that the certificate need not name."""
        return None if self._files is None else tls.trusting(self._files)

    @property
    def key_digest(self) -> str:
        """What the replicas know of `key`."""
        return hashlib.sha256(self.key.encode()).hexdigest()

    def check(self, access: AccessConfig) -> None:
        """Refuse what cannot work, or would let in whom nobody meant to.

        Raises:
            ConfigError: the address cannot be listened on, others reach it and there is no key, or the keys or the
                certificate are none.
        """
        self._keys = keys = KeyRing.of(access)
        self.key_names = keys.names
        remedy = "give --api-keys FILE or TPRAY_API_KEY; or, if whoever reaches the port may ask, --insecure-no-key"
        check_host(self.host, access, keys, "--host", remedy)
        if self._files is None and keys and not on_loopback(self.host):
            log.warning("keys and texts cross the network unencrypted: give --tls-cert and --tls-key, or have a proxy "
                        "in front that speaks TLS")  # fmt: skip
        check_port(self.host, self.port)
        if self.grpc_port is not None:
            check_port(self.host, self.grpc_port, "--grpc-port")
        if self._files is not None:
            tls.check(self._files)

    def places(self, folder: Path, ports: tuple[int, ...], request_timeout_s: float) -> dict[str, str]:
        """The environment that has Serve listen here, by itself and with files of its own; see `haproxy.places`."""
        if self._files is not None:
            self._certificate = tls.Certificate(self._files, folder)
        path = None if self._certificate is None else self._certificate.path
        host = self.host if haproxy.is_used() else ""
        found = haproxy.places(folder, ports, self.token, errors(request_timeout_s), path, host)
        if path is not None and not found:
            raise ConfigError(
                "TLS needs HAProxy, which ray[serve] brings for Linux: have a proxy in front that speaks TLS"
            )
        return found

    def renew(self) -> None:
        """Show the certificate that the files hold now, and say so where the keys are others, or cannot be read.

        The replicas read the keys for themselves, but nobody sees what they log.
        """
        self._keys.look()
        if self._certificate is not None:
            self._certificate.renew()


def check_port(host: str, port: int, flag: str = "--port") -> None:
    """Raise `ConfigError` unless ``host:port``, which ``flag`` says, can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port} ({e.strerror or e}): choose another {flag} or --host") from e


def errors(request_timeout_s: float) -> dict[int, bytes]:
    """HAProxy's own errors as the first dialect words them: by HAProxy's status, the whole HTTP answer."""
    from tpray.serving.dialects import DIALECTS

    arrives_s = haproxy.REQUEST_ARRIVES_S
    gone = GroupError("no replica can answer now: try again later")
    said: dict[int, TprayError] = {
        400: InputError(f"the request cannot be read: it is not valid HTTP, or its body paused for {arrives_s} s"),
        408: InputError(f"the request did not arrive within {arrives_s} s: send it without pauses"),
        500: gone,
        502: gone,
        503: gone,
        504: DeadlineError(f"no replica answered within {request_timeout_s + haproxy.ANSWER_GRACE_S:g} s"),
    }
    answers = {}
    for status, error in said.items():
        rendered = DIALECTS[0].render_error(error)
        shown = HTTPStatus(rendered.status if status >= 500 else status)
        headers = {"content-type": "application/json", "content-length": str(len(rendered.body)), **rendered.headers}
        head = [f"HTTP/1.1 {shown.value} {shown.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        answers[status] = "\r\n".join([*head, "", ""]).encode() + rendered.body
    return answers
