"""Triton's client asks over gRPC, through the command, Ray Serve and HAProxy, also where the replica has died."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from tests.served import processes_of, start

PLACE = "The company HuggingFace is based in New York City"
OFFICE = "HuggingFace's headquarters are situated in Manhattan"


def of_text(name: str, text: str) -> triton.InferInput:
    made = triton.InferInput(name, [1], "BYTES")
    made.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return made


@pytest.mark.ray
@pytest.mark.slow
def test_grpc_through_serve(tmp_path: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    server = start(free_port(), tmp_path, "--tp", "2", "--grpc-port", str(port))
    address = f"127.0.0.1:{port}"
    try:
        client, inputs = triton.InferenceServerClient(address), [of_text("text", PLACE), of_text("text_pair", OFFICE)]
        assert client.is_server_ready()
        score = client.infer("demo", inputs).as_numpy("probabilities")[0, 1]
        over_http = server.predict({"inputs": [PLACE, OFFICE]}).json()[0]
        assert over_http == {"label": "paraphrase", "score": pytest.approx(score, abs=1e-6)}
        for size, words in ((2_000_000, "larger than 2000000 bytes"), (5_000_000, "larger than max")):
            with pytest.raises(InferenceServerException, match=words) as caught:
                client.infer("demo", [of_text("text", "x" * size)])
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            services = ProtoReflectionDescriptorDatabase(channel).get_services()
            assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(services)
        (replica,) = processes_of(server, "ServeReplica")
        listening = own_ports(replica)
        strangers = [other for other in listening if other not in (port,) and refuses(other, inputs)]
        assert len(strangers) == 1  # the replica's own gRPC, which only HAProxy may use

        os.kill(replica, signal.SIGKILL)
        codes, give_up = set(), time.monotonic() + 90
        while time.monotonic() < give_up:
            try:
                client.infer("demo", inputs, client_timeout=30)
            except InferenceServerException as e:
                codes.add(e.status())
                time.sleep(0.05)
            else:
                if codes:
                    break
        assert codes == {"StatusCode.UNAVAILABLE"}
        assert client.infer("demo", inputs).as_numpy("probabilities")[0, 1] == pytest.approx(score, abs=1e-6)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)


def own_ports(pid: int) -> list[int]:
    """The ports on loopback that a process listens on; there must be no others."""
    inodes = {os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").glob("*") if os.path.islink(fd)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, number = fields[1].split(":")
                assert host in ("0100007F", "0000000000000000FFFF00000100007F"), "listens on other addresses too"
                found.append(int(number, 16))
    return found


def refuses(port: int, inputs: list[triton.InferInput]) -> bool:
    """Whether gRPC's own sentence says that a request there was not meant for it."""
    try:
        triton.InferenceServerClient(f"127.0.0.1:{port}").infer("demo", inputs, client_timeout=5)
    except InferenceServerException as e:
        return "meant for another server" in e.message()
    return False
