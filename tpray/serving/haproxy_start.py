"""Start HAProxy with the configuration that Serve wrote, after changing in it what Serve has no setting for.

Run as a script, instead of HAProxy and with its arguments, by Serve's manager of HAProxy. Only the standard library is
used, since HAProxy starts at every change of the replicas.

Source: ray/serve/_private/haproxy_templates.py of Ray 2.60; https://docs.haproxy.org/2.8/configuration.html.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
"""Where Serve is told to listen that HAProxy is in front of."""
TOKEN_HEADER = "x-tpray-server"
"""Shows a replica the server's token."""
TIMEOUT_HEADER = "x-request-timeout-seconds"
"""How long the client will wait, from the arrival of its request; Ray Serve's name for it."""
RENAMED_TIMEOUT_HEADER = "x-tpray-timeout"
"""What HAProxy makes of it for `tpray serve`, since Serve reads it too."""

REQUEST_ID = "^[A-Za-z0-9_.:/+=@~-]{1,128}$"
"""A caller's id of its request that is taken; in place of another one Serve makes its own."""


@dataclass(frozen=True)
class Rules:
    """What is changed.

    folder: where the sockets and the answers to errors are. binary: HAProxy. token: shown to the replicas. statuses: of
    the errors that have an answer, ``<folder>/<status>.http``. request_arrives_s: how long a request may take to
    arrive, its body included as far as it fits HAProxy's buffer. certificate: a file with its key too; "": no TLS.
    host: where clients are listened to; "": where Serve's configuration says.
    """

    folder: str
    binary: str
    token: str
    statuses: list[int]
    request_arrives_s: int
    certificate: str = ""
    host: str = ""


def rewrite(config: str, rules: Rules) -> str:
    """Serve's configuration of HAProxy with these changes:

    - the listeners for statistics and metrics, which Serve has on all addresses, are sockets in the folder;
    - HTTP and gRPC are listened to at the host, and Serve's own servers, which Serve would have there too, are not;
    - where there is a certificate, both are encrypted;
    - errors have the answers of the folder, and a request that comes before any replica is known gets the one for 503;
    - a request must arrive in time, and is shown to the replica with the token; more connections than it takes wait;
    - headers that Serve's replica reads for itself, with errors in plain text, do not reach it: how long a client waits
      is renamed;
    - Serve's replica does not listen for whether a client leaves, which costs two tasks a request: ours does;
    - without a replica HAProxy answers 503 itself, where Serve's own proxy would keep the request until there is one.
      It has a server of its own for that, always up: the answer of a server is passed on, whereas an error of HAProxy's
      own drops a client's connection without a word if the replica's was used before;
    - so it is for gRPC, where there is one, with UNAVAILABLE.

    Raises:
        ValueError: a line that is to be changed is not there: Serve writes it in another way.
    """
    secure = f" ssl crt {rules.certificate}" if rules.certificate else ""
    if rules.host:
        at, also = (f"[{rules.host}]", " v4v6" if rules.host == "::" else "") if ":" in rules.host else (rules.host, "")
        config, moved = re.subn(_BIND, rf"\g<1>{at}\g<3>{also}\g<4>", config, flags=re.MULTILINE)
        if moved != len(re.findall(r"^frontend (?:http|grpc)_frontend$", config, re.MULTILINE)):
            raise ValueError(f"Serve's configuration of HAProxy has {moved} lines that bind {LOOPBACK}")
    told = "    http-request set-header x-forwarded-proto https\n" if secure else ""  # a redirection says it again
    errors = "".join(f"    errorfile {status} {rules.folder}/{status}.http\n" for status in rules.statuses)
    none = f"{rules.folder}/none.sock"
    # Connections that HAProxy does not take yet wait; of its own accord it lets only so many wait as it takes.
    arrival = (
        "    backlog 4096\n"
        "    option http-buffer-request\n"
        f"    timeout http-request {rules.request_arrives_s}s\n"
        f"    http-request set-header {TOKEN_HEADER} {rules.token}\n"
        f"    http-request del-header {RENAMED_TIMEOUT_HEADER}\n"
        f"    http-request set-header {RENAMED_TIMEOUT_HEADER} %[req.hdr({TIMEOUT_HEADER})]"
        f" if {{ req.hdr({TIMEOUT_HEADER}) -m found }}\n"
        f"    http-request del-header {TIMEOUT_HEADER}\n"
        f"{told}"
        f"    http-request del-header x-request-id unless {{ req.fhdr(x-request-id) -m reg {REQUEST_ID} }}\n"
        "    http-request set-header x-request-disconnect-disabled ?1\n"
        "    http-request del-header serve_multiplexed_model_id\n"
    )

    def is_up(found: re.Match[str]) -> str:
        """Whether one of a backend's replicas is up; the number of servers that are would count the one of 503."""
        backend = re.escape(found[2])
        section = re.search(rf"^backend {backend}\n(?:(?!backend ).*\n)*", config, re.MULTILINE)
        replicas = re.findall(r"^ *server (SERVE_REPLICA\S*) ", section[0] if section else "", re.MULTILINE)
        conditions = [f"srv_is_up({found[2]}/{replica})" for replica in replicas] or ["always_false"]
        return "\n".join(f"{found[1]} {condition}" for condition in conditions)

    grpc_none = f"{rules.folder}/none-grpc.sock"
    grpc_arrival = (
        "    backlog 4096\n"
        f"    http-request set-header {TOKEN_HEADER} {rules.token}\n"
        "    http-request del-header multiplexed_model_id\n"
        "    http-request del-header request_id if { req.hdr(request_id) -m reg [^\\ -~] }\n"
    )
    with_grpc = re.search(r"^frontend grpc_frontend$", config, re.MULTILINE) is not None
    last = f"listen none\n    bind unix@{none}\n{_UNAVAILABLE}"
    if with_grpc:
        last += f"listen none_grpc\n    bind unix@{grpc_none} proto h2\n{_GRPC_UNAVAILABLE}"

    # What is looked for, what it becomes, and whether it must be there.
    changes: tuple[tuple[str, str | Callable[[re.Match[str]], str], bool], ...] = (
        (r"^ *bind :\d+$", f"    bind unix@{rules.folder}/prometheus.sock", True),
        (r"^(listen stats\n) *bind \*:\d+$", rf"\1    bind unix@{rules.folder}/stats.sock", True),
        (r"^ *errorfile .*\n", "", False),
        (r"^defaults\n", f"defaults\n{errors}", True),
        (r"^(frontend http_frontend\n *bind .*)\n", rf"\1{secure}\n{arrival}", True),
        *([(r"^( *bind \S+(?: v4v6)?) proto h2$", rf"\1{secure} alpn h2", False)] if secure else []),
        (r"^(backend default_backend\n) *http-request return status 404 .*\n", f"\\1{_UNAVAILABLE}", True),
        (r"^( *acl \S+_server_up) nbsrv\((\S+)\) ge 1$", is_up, False),
        (r"^ *server SERVE_PROXY_ACTOR\S* .* backup\n", "", False),
        (r"^( *# Servers in this backend\n)", rf"\1    server none unix@{none} backup no-check\n", False),
        (r"^(frontend grpc_frontend\n(?: *#.*\n)* *bind .*\n)", rf"\1{grpc_arrival}", with_grpc),
        (_GRPC_UNKNOWN, rf"\1{_GRPC_UNAVAILABLE}", False),
        (_GRPC_SERVERS, rf"\1    server none unix@{grpc_none} proto h2 backup no-check\n", False),
        (r"\Z", last, True),
    )
    for pattern, replacement, needed in changes:
        config, found = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if needed and found != 1:
            raise ValueError(f"Serve's configuration of HAProxy has {found} lines like {pattern!r}, and not one")
    return config


_BIND = r"^(frontend (?:http|grpc)_frontend\n(?: *#.*\n)* *bind )(127\.0\.0\.1)(:\d+)(.*)$"
_UNAVAILABLE = "    http-request return status 503 default-errorfiles\n"
_GRPC_UNAVAILABLE = (
    "    http-request return status 200 content-type application/grpc hdr grpc-status 14"
    ' hdr grpc-message "no replica can answer now: try again later"\n'
)
_GRPC_UNKNOWN = r"^(backend default_grpc_backend\n)(?:.*\n)*?(?: *http-request return .*\n){2}"
_GRPC_SERVERS = r"^( *# `proto h2` makes HAProxy speak HTTP/2 cleartext to backend gRPC servers\.\n)"


def main() -> None:
    rules = Rules(**json.loads(Path(sys.argv[1]).read_text()))
    arguments = sys.argv[2:]
    if "-f" in arguments:
        config = Path(arguments[arguments.index("-f") + 1])
        config.write_text(rewrite(config.read_text(), rules))
    os.execv(rules.binary, [rules.binary, *arguments])


if __name__ == "__main__":
    main()
