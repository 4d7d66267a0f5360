"""What another process asks of a server on this machine: its Serve handle, or an answer over HTTP."""

from __future__ import annotations

import json
import os
import select
import ssl
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from tpray import config
from tpray.errors import ConfigError, GroupError
from tpray.serving.handle import Connected, Handle
from tpray.serving.servers import ServerRecord, running_servers


def connect(app: str = "tpray", url: str | None = None, api_key: str | None = None) -> Handle:
    """The handle of a server that runs on this machine, for another process than its own.

    ``connect().classify.remote([...]).result()`` gives what `LocalClassifier.classify` returns; ``rerank``, ``score``
    and ``classify_tokens`` likewise. What the server raises, such as `InputError`, is raised here.

    Args:
        app: the Serve application's name; ``tpray serve`` calls its own ``tpray``.
        url: of the server, where several run here: ``http://127.0.0.1:8000``.
        api_key: that the server at ``url`` asks for; None: that of ``TPRAY_API_KEY``. Ray asks for none of tpray's.

    Raises:
        ConfigError: no server runs here, or several and ``url`` does not say which, or this process is connected to
            another one's Ray: a process has one connection at a time.
    """
    record = _choose(url)
    if record is None:  # one that a Serve config file started, or that another user did
        from tpray.local_ray.local import join_ray

        join_ray(None if url is None else str(ask_info(url, api_key)["ray_address"]))
        alone = Connected(_serve_handle(app), threading.Event())
        return Handle(lambda: alone)
    link = _link_to(record)
    server = Connected(_serve_handle(app), link.over)

    def find() -> Connected:
        nonlocal link, server
        if link.over.is_set() or _has_ended(link.record.pid):
            link = _link_to(_restarted(record.url))
            server = Connected(_serve_handle(app), link.over)
        return server

    return Handle(find)


def _choose(url: str | None) -> ServerRecord | None:
    """The server that is meant; None where nothing is known but to Ray.

    Raises:
        ConfigError: several run here, and nothing says which is meant.
    """
    if url is None and config.ray_address():
        return None
    servers = running_servers()
    if url is not None:
        servers = [server for server in servers if server.url == url.rstrip("/")]
    if len(servers) > 1:
        known = ", ".join(f"{server.url} ({server.model})" for server in servers)
        raise ConfigError(
            f"{len(servers)} servers run on this machine, {known}: say which, as in "
            f'tpray.connect(url="{servers[0].url}")'
        )
    return servers[0] if servers else None


@dataclass(frozen=True)
class _Link:
    """This process's connection to the Ray of a server. over: it is no more."""

    record: ServerRecord
    over: threading.Event = field(default_factory=threading.Event)


_lock = threading.Lock()
_link: _Link | None = None  # a process has one at a time


def _link_to(record: ServerRecord) -> _Link:
    """The connection to the Ray of a server, made now if there is none.

    Ray ends a process whose Ray has been gone for a minute. So a thread waits for the end of the server, and takes the
    connection down then.

    Raises:
        ConfigError: this process is connected to another one.
    """
    from tpray.local_ray.local import connected_to, join_ray

    global _link
    with _lock:
        if _link is not None and _has_ended(_link.record.pid):
            _drop(_link)
        if _link is not None and connected_to() is None:  # somebody has called ray.shutdown()
            _link.over.set()
            _link = None
        if connected_to() is None:
            join_ray(record.ray_address)
        found = connected_to()
        if found != record.ray_address:
            raise ConfigError(
                f"this process is connected to the Ray at {found}, and the server at {record.url} runs on that at "
                f"{record.ray_address}: ask it from another process, or call ray.shutdown() before"
            )
        if _link is None:
            _link = _Link(record)
            threading.Thread(target=_watch, args=(_link,), name="tpray-connection", daemon=True).start()
        return _link


def _watch(link: _Link) -> None:
    """Take the connection down once its server has ended."""
    try:
        process = os.pidfd_open(link.record.pid)
    except ProcessLookupError:
        pass
    else:
        select.select([process], [], [])
        os.close(process)
    with _lock:
        if _link is link:
            _drop(link)


def _drop(link: _Link) -> None:
    """Have this process connected to no Ray, and know nothing of the one that is gone."""
    global _link
    from tpray.local_ray.local import leave_ray

    link.over.set()
    _link = None
    leave_ray(link.record.ray_address)


def _restarted(url: str) -> ServerRecord:
    """The server that is at ``url`` now.

    Raises:
        GroupError: none is.
    """
    for server in running_servers():
        if server.url == url:
            return server
    raise GroupError(f"the server at {url} is gone: start it, and ask again")


def _has_ended(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 0)[0])
    finally:
        os.close(process)


def _serve_handle(app: str) -> Any:
    from ray import serve

    from tpray.local_ray.local import quiet_logs

    try:
        handle = serve.get_app_handle(app)
        quiet_logs()
        return handle
    except Exception as e:  # Serve raises a class of its own per reason, all of them "there is none"
        raise ConfigError(f"no Serve application {app!r} runs on this machine: start it with `tpray serve`") from e


def get(url: str, timeout_s: float, key: str | None = None, context: ssl.SSLContext | None = None) -> Any:
    """The answer of a server of ours, which no proxy of the environment is asked for.

    Args:
        key: that is shown; None: that of ``TPRAY_API_KEY``, if it is set.
        context: what certificates are trusted; None: those that this machine or ``SSL_CERT_FILE`` trusts.
    """
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    return opener.open(Request(url, headers=bearer(key)), timeout=timeout_s)


def bearer(key: str | None = None) -> dict[str, str]:
    """The header that shows a key; None: that of ``TPRAY_API_KEY``, if it is set.

    Raises:
        ConfigError: it cannot be sent.
    """
    key = key or config.api_key()
    if key is None:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("the key has characters that no key has: look at --api-key or TPRAY_API_KEY")
    return {"authorization": f"Bearer {key}"}


def ask_info(url: str, key: str | None = None) -> dict[str, Any]:
    """What ``GET /info`` of the server at ``url`` says. key: as for `get`.

    Raises:
        ConfigError: none answers there, or not without a key.
    """
    try:
        with get(f"{url.rstrip('/')}/info", 30, key) as answer:
            info: dict[str, Any] = json.load(answer)
        _ = info["task"], info["ray_address"]
        return info
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, HTTPError) and e.code in KEY_STATUSES:
            raise ConfigError(key_wanted(url)) from e
        raise ConfigError(f"no tpray server answers at {url} ({e}): start it with `tpray serve`") from e


KEY_STATUSES = (401, 403)


def key_wanted(url: str) -> str:
    """What to do about an answer that says that no key was shown, or a wrong one."""
    return f"the server at {url} asks for a key and takes no other than its own: set TPRAY_API_KEY to one"
