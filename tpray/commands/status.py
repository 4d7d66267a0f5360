"""``tpray status``."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from typing import Annotated, Any
from urllib.error import HTTPError, URLError

import typer
from rich.live import Live

from tpray.commands.console import err, out, print_error, status_line, status_table
from tpray.commands.flags import ClientKey
from tpray.errors import ConfigError, TprayError

EVERY_S = 1.0
"""How often `--watch` asks."""


def status(
    url: Annotated[
        str, typer.Argument(envvar="TPRAY_URL", help="Where a tpray server listens.")
    ] = "http://127.0.0.1:8000",
    watch: Annotated[bool, typer.Option("--watch", help="Ask again each second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what /info says, as JSON in a line.")] = False,
    api_key: ClientKey = None,
) -> None:
    """Ask a running server whether it is healthy, what it serves, and how much waits."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not a URL: it starts with http:// or https://")
    url = url.rstrip("/")
    if watch:
        _watch(url, api_key, as_json)
        return
    info, healthy = ask(url, api_key)
    if as_json:
        _print_json(info, healthy)
    else:
        out.print(status_table(info, healthy))
    raise typer.Exit(0 if healthy else 1)


def ask(url: str, api_key: str | None) -> tuple[dict[str, Any], bool]:
    """What ``/info`` of a server says, and whether it is healthy.

    Raises:
        TprayError: no server answers there.
        ConfigError: it asks for a key, and this is none of its own.
    """
    from tpray.serving.client import KEY_STATUSES, get, key_wanted

    try:
        with get(f"{url}/info", 10, api_key) as answer:
            info = json.load(answer)
        if not isinstance(info, dict):
            raise ValueError("what it says of itself is no object")
        try:
            get(f"{url}/health", 30, api_key).close()
            healthy = True
        except HTTPError:
            healthy = False
    except (URLError, OSError, ValueError) as e:
        if isinstance(e, HTTPError) and e.code in KEY_STATUSES:
            raise ConfigError(key_wanted(url)) from e
        reason = getattr(e, "reason", e)
        said = getattr(reason, "strerror", None) or reason
        raise TprayError(f"no tpray server answers at {url}: {said}; start one, or name where it listens") from e
    return info, healthy


def _watch(url: str, api_key: str | None, as_json: bool) -> None:
    """Until Ctrl-C; on a terminal in one place, elsewhere and as JSON a line each time. A server may go and come."""
    with ExitStack() as stack:
        live = Live(console=out, auto_refresh=False) if out.is_terminal and not as_json else None
        if live is not None:
            stack.enter_context(live)
        try:
            while True:
                _show_once(url, api_key, as_json, live)
                time.sleep(EVERY_S)
        except KeyboardInterrupt:
            err.print("Watched until Ctrl-C", highlight=False)


def _show_once(url: str, api_key: str | None, as_json: bool, live: Live | None) -> None:
    try:
        info, healthy = ask(url, api_key)
    except TprayError as e:
        if isinstance(e, ConfigError):  # another try would be the same
            raise
        if live is not None:
            live.update(str(e), refresh=True)
        else:
            print_error(e)
        return
    if live is not None:
        live.update(status_table(info, healthy), refresh=True)
    elif as_json:
        _print_json(info, healthy)
    else:
        out.print(status_line(info, healthy), highlight=False, markup=False, soft_wrap=True)


def _print_json(info: dict[str, Any], healthy: bool) -> None:
    sys.stdout.write(json.dumps({"healthy": healthy, **info}, ensure_ascii=False) + "\n")
    sys.stdout.flush()
