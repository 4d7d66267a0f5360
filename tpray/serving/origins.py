"""From which web pages a server may be asked that asks for no key, and so listens on loopback alone.

A browser on this machine reaches it, and runs the scripts of any page. Two headers, which no script can change, tell:

``Origin``: a page of another origin has sent the request. It could not read the answer, but would have it computed.
``Host``: a page whose own name was made to resolve to 127.0.0.1 (DNS rebinding) asks "itself", and could read it. So a
name must be this machine's. An address is right: no name was resolved. Other clients send no ``Origin``, and the
address or the name that they were given.

Source: https://www.rfc-editor.org/rfc/rfc6454 (section 7, Origin); Jupyter (``allow_remote_access``), Ollama
(``OLLAMA_ORIGINS``) and Vite (``allowedHosts``) look at the same.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from tpray.errors import MisdirectedError

_KNOWN = 64
"""How many values of Host are remembered as right."""


class Origins:
    """What a server without keys takes.

    Args:
        allowed: origins whose pages may ask, and whose hosts are names of this server; *: all.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        allowed = tuple(allowed)
        self._any = "*" in allowed
        self._pages = {origin.encode() for origin in allowed}
        own = ("localhost", "host.docker.internal", socket.gethostname().lower())  # the second in Docker's containers
        self._names = {*own, *(urlsplit(each).hostname for each in allowed)}
        self._known: set[bytes] = set()

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuse what a web page of another site asks.

        Raises:
            MisdirectedError: it is one.
        """
        found = dict(headers)
        host, origin = found.get(b"host"), found.get(b"origin")
        if self._any:
            return
        if host is not None and host not in self._known:
            if not self._is_own(host):
                raise MisdirectedError(
                    f"this server is not called {host.decode('latin-1')!r}: ask it by its address or as localhost; "
                    "whoever runs it can name others with --cors-origin, or ask for keys (--api-keys)"
                )
            if len(self._known) < _KNOWN:
                self._known.add(host)
        if origin is not None and origin not in self._pages and origin.partition(b"://")[2] != host:
            raise MisdirectedError(
                f"pages of {origin.decode('latin-1')!r} may not ask this server: whoever runs it can let them, with "
                "--cors-origin"
            )

    def _is_own(self, host: bytes) -> bool:
        try:
            name = (urlsplit(f"//{host.decode('latin-1')}").hostname or "").removesuffix(".")
            if name in self._names or name.endswith(".localhost"):  # which browsers do not resolve: RFC 6761
                return True
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        return True
