"""A server with keys, TLS and pages of another origin, as users start and ask it."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trustme

from tests import sockets
from tests.served import assert_all_gone, children_of, start
from tpray.config import AccessConfig
from tpray.serving import keys
from tpray.serving.entrance import Entrance
from tpray.serving.keys import digest_of

ALICE, BOB, DEFAULT = "alice-0123456789", "bob-0123456789", "default-0123456789"
PAGE = "https://app.example.com"


def command(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpray", *args],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"COLUMNS": "200"} | environ,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 lets others on the network ask, and there is no key: give --api-keys"),
        (("--host", "::"), "lets others on the network ask"),
        (("--api-keys", "/no/such/file"), "the file of keys /no/such/file cannot be read (No such file or directory)"),
        (("--api-key", "short"), "the key 'default' is not one: take 8 or more"),
        (("--open-routes", "health,info"), "there is no 'info': name some of health, page, metrics, or none"),
        (("--cors-origin", "example.com"), "'example.com' is no origin"),
        (("--tls-cert", "cert.pem"), "--tls-cert and --tls-key go together: give both"),
        (("--tls-cert", "/no/cert", "--tls-key", "/no/key"), "--tls-cert /no/cert cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(flags: tuple[str, ...], words: str) -> None:
    done = command("serve", "--port", "18999", *flags)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_keys_tls_and_pages_of_another_origin(free_port: Callable[[], int], tmp_path: Path) -> None:
    ca = trustme.CA()
    made = ca.issue_cert("127.0.0.1")
    (tmp_path / "ca").write_bytes(ca.cert_pem.bytes())
    (tmp_path / "cert").write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
    (tmp_path / "key").write_bytes(made.private_key_pem.bytes())
    keys, port, grpc_port = tmp_path / "keys", free_port(), free_port()
    keys.write_text(f"alice: {ALICE}\nbob: sha256:{digest_of(BOB).hex()} requests=2/min\n")
    tls = "--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key")
    os.environ["TPRAY_API_KEY"] = DEFAULT
    try:
        open_to_all = "--host", "0.0.0.0", "--grpc-port", str(grpc_port)
        flags = "--tp", "1", "--api-keys", str(keys), "--cors-origin", PAGE
        server = start(port, tmp_path, *flags, *tls, *open_to_all)
    finally:
        del os.environ["TPRAY_API_KEY"]
    family = children_of(server.process.pid)
    try:
        url = f"https://127.0.0.1:{port}"
        assert f"at https://0.0.0.0:{port}" in server.log.read_text()
        ports = {"port": port, "grpc_port": grpc_port}
        assert sockets.undeclared(server.process.pid, "serve", host="all", **ports) == []
        reached = {each for each in sockets.listening(server.process.pid) if each.address == "all"}
        assert {(each.process, each.port) for each in reached} == {("haproxy", port), ("haproxy", grpc_port)}
        context = ssl.create_default_context(cafile=str(tmp_path / "ca"))
        with httpx.Client(base_url=url, verify=context, timeout=60) as http:
            assert http.post("/predict", json={"inputs": "a"}).status_code == 401
            assert http.get("/health").status_code == http.get("/docs").status_code == 200
            assert {http.get(path).status_code for path in ("/info", "/metrics", "/docs/../info", "/v1/models")} == {
                401
            }
            for key in (ALICE, BOB, DEFAULT):
                shown = {"authorization": f"Bearer {key}", "origin": PAGE}
                answer = http.post("/predict", json={"inputs": "a"}, headers=shown)
                assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
            bob = {"authorization": f"Bearer {BOB}"}
            statuses = [http.post("/predict", json={"inputs": "a"}, headers=bob).status_code for _ in range(3)]
            assert statuses[-1] == 429
            asked = {"origin": PAGE, "access-control-request-method": "POST",
                     "access-control-request-headers": "authorization,content-type"}  # fmt: skip
            assert http.options("/predict", headers=asked).status_code == 200
            moved = http.get("/docs/", headers={"authorization": f"Bearer {ALICE}"})
            assert moved.headers.get("location", url).startswith(url)
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{url}/health")
        trusted = {"SSL_CERT_FILE": str(tmp_path / "ca")}
        healthy = command("status", url, TPRAY_API_KEY=ALICE, **trusted)
        assert healthy.returncode == 0, healthy.stderr
        assert "healthy" in healthy.stdout
        without = command("status", url, **trusted)
        assert without.returncode == 2
        assert "asks for a key and takes no other than its own: set TPRAY_API_KEY" in " ".join(without.stderr.split())
        load = "--concurrency", "1", "--duration", "0.5", "--warm-up", "0"
        assert command("bench", url, *load, TPRAY_API_KEY=ALICE, **trusted).returncode == 0
        code = f"import tpray; print(tpray.connect(url={url!r}, api_key={ALICE!r}).classify.remote('a').result())"
        ran = [sys.executable, "-c", code]
        handle = subprocess.run(ran, capture_output=True, text=True, timeout=120, check=False, env=os.environ | trusted)
        assert "label" in handle.stdout, handle.stderr
        for pid in family:
            environ = Path(f"/proc/{pid}/environ")
            assert DEFAULT.encode() not in (environ.read_bytes() if environ.exists() else b"")
        assert not {key for key in (ALICE, BOB, DEFAULT) if key in server.log.read_text()}
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
    assert_all_gone(family, within_s=10)


def test_the_command_says_what_becomes_of_a_changed_file_of_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("alice: correct-horse\n")
    entrance = Entrance("127.0.0.1", 0)
    entrance.check(AccessConfig(keys_file=file))
    entrance.renew()
    assert not caplog.messages
    for content, said in (("alice\n", "the keys stay as they were"), ("bob: battery-staple\n", "its keys are bob")):
        file.write_text(content)
        entrance.renew()
        assert said in caplog.messages[-1]
    entrance.renew()
    assert len(caplog.messages) == 2
