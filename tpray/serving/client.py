"""What another process asks of a server on this machine: its Serve handle, or an answer over HTTP."""

from __future__ import annotations

import json
import ssl
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from tpray import config
from tpray.errors import ConfigError


def connect(app: str = "tpray", url: str | None = None, api_key: str | None = None) -> Any:
    """The Serve handle of a server that runs on this machine, for another process than its own.

    ``connect().classify.remote([...]).result()`` gives what `Classifier.classify` returns, and
    ``connect().rerank.remote(query, documents).result()`` what `Classifier.rerank` does; ``classify_tokens`` likewise.

    Args:
        app: the Serve application's name; ``tpray serve`` calls its own ``tpray``.
        url: of the server, where several run here: ``http://127.0.0.1:8000``.
        api_key: that the server at ``url`` asks for; None: that of ``TPRAY_API_KEY``. Ray asks for none of tpray's.

    Raises:
        ConfigError: no server runs here, or several and ``url`` does not say which.
    """
    from ray import serve

    from tpray.local_ray.local import join_ray

    join_ray(None if url is None else str(ask_info(url, api_key)["ray_address"]))
    try:
        return serve.get_app_handle(app)
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
