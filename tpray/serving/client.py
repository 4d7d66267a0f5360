"""What another process asks of a server on this machine: its Serve handle, or an answer over HTTP."""

from __future__ import annotations

import json
from typing import Any
from urllib.request import ProxyHandler, build_opener

from tpray.errors import ConfigError


def connect(app: str = "tpray", url: str | None = None) -> Any:
    """The Serve handle of a server that runs on this machine, for another process than its own.

    ``connect().classify.remote([...]).result()`` gives what `Classifier.classify` returns, and
    ``connect().rerank.remote(query, documents).result()`` what `Classifier.rerank` does; ``classify_tokens`` likewise.

    Args:
        app: the Serve application's name; ``tpray serve`` calls its own ``tpray``.
        url: of the server, where several run here: ``http://127.0.0.1:8000``.

    Raises:
        ConfigError: no server runs here, or several and ``url`` does not say which.
    """
    from ray import serve

    from tpray.local_ray.local import join_ray

    join_ray(None if url is None else str(ask_info(url)["ray_address"]))
    try:
        return serve.get_app_handle(app)
    except Exception as e:  # Serve raises a class of its own per reason, all of them "there is none"
        raise ConfigError(f"no Serve application {app!r} runs on this machine: start it with `tpray serve`") from e


def get(url: str, timeout_s: float) -> Any:
    """The answer of a server of ours, which no proxy of the environment is asked for."""
    return build_opener(ProxyHandler({})).open(url, timeout=timeout_s)


def ask_info(url: str) -> dict[str, Any]:
    """What ``GET /info`` of the server at ``url`` says.

    Raises:
        ConfigError: none answers there.
    """
    try:
        with get(f"{url.rstrip('/')}/info", 30) as answer:
            info: dict[str, Any] = json.load(answer)
        _ = info["task"], info["ray_address"]
        return info
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"no tpray server answers at {url} ({e}): start it with `tpray serve`") from e
