"""Who may ask a replica, for what, and from which pages of a browser."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import MutableMapping
from typing import Any

from starlette._utils import get_route_path  # that by which Starlette's routers find a route

from tpray.config import AccessConfig, OpenRoute
from tpray.errors import ConfigError
from tpray.serving.keys import ASKING, Caller, KeyRing
from tpray.serving.origins import Origins

log = logging.getLogger(__name__)

OPEN: dict[OpenRoute, tuple[str, ...]] = {
    "health": ("/health", "/ping", "/v2/health/live", "/v2/health/ready"),
    "page": ("/", "/docs", "/docs/assets/", "/openapi.json", "/page/"),
    "metrics": ("/metrics",),
}
"""What may be had without a key, with GET; all below a path that ends with a slash.

The pages hold nothing of the model: they ask for what they show, with the key that a person gives them."""


class Access:
    """What a configuration says of who may ask.

    Args:
        keys: none: everybody may.
        origins: from which pages, where a key is not asked for; None: from all.
    """

    def __init__(
        self, config: AccessConfig | None = None, keys: KeyRing | None = None, origins: Origins | None = None
    ) -> None:
        config, self.keys = config or AccessConfig(), KeyRing() if keys is None else keys
        paths = [path for name in config.open_routes for path in OPEN[name]]
        named = {path for path in paths if path == "/" or not path.endswith("/")}
        self._open = named | {f"{path}/" for path in named if path != "/"}
        self._below = tuple(path for path in paths if path not in named)
        self.origins = config.cors_origins
        self._pages = origins

    @classmethod
    def of(cls, config: AccessConfig, own_digest: str | None = None) -> Access:
        """As configured.

        Args:
            own_digest: of one more key, with which the server itself asks; where no others are asked for, nor is it.

        Raises:
            ConfigError: see `KeyRing.of`.
        """
        keys = KeyRing.of(config, own_digest)
        # A browser sends no key of its own accord; and without one only this machine is answered, see `check_host`.
        return cls(config, keys, None if keys or config.insecure_no_key else Origins(config.cors_origins))

    def check(self, scope: MutableMapping[str, Any]) -> None:
        """Let a request in, or not: its headers and path say so. Whose it is, is noted in its state and for `charge`.

        Raises:
            UnauthorizedError: it needs a key. RateLimitError: its key has used what it may.
            MisdirectedError: a web page of another site has sent it; see `tpray.serving.origins`.
        """
        if self._pages is not None:
            self._pages.check(scope["headers"])
        if not self.keys or self.is_open(scope):
            ASKING.set(None)  # whoever asked before in this context
            return
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        caller = self.admit(shown[0] if len(shown) == 1 else None)
        assert caller is not None, "keys are asked for"
        scope.setdefault("state", {})["key"] = caller.name
        log.info("%s: %s %r", caller.name, scope.get("method", "websocket"), scope["path"])

    def admit(self, authorization: bytes | None) -> Caller | None:
        """Let a call in, by what a client sends as ``authorization``, over HTTP or gRPC; None: no keys are asked for.

        Raises:
            As `check`.
        """
        if not self.keys:
            return None
        ASKING.set(None)  # whoever asked before in this context
        caller = self.keys.find(authorization)
        ASKING.set(caller)
        caller.admit()
        return caller

    def is_open(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether a request needs no key, because of its path."""
        if scope.get("method") not in ("GET", "HEAD"):
            return False
        path = get_route_path(scope)
        return path in self._open or (path.startswith(self._below) and ".." not in path)


def check_host(host: str, config: AccessConfig, keys: KeyRing, named: str, remedy: str) -> None:
    """Refuse to let others on the network ask without a key.

    Args:
        named: what has set the host, for the message. remedy: what to do there.

    Raises:
        ConfigError: nothing says that this is meant.
    """
    if keys or config.insecure_no_key or on_loopback(host):
        return
    raise ConfigError(f"{named} {host} lets others on the network ask, and there is no key: {remedy}")


def on_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)}
        return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
    except (OSError, ValueError):  # it is no address of this machine
        return False
