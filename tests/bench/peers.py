"""The other engines, in process and behind Ray Serve: ``python -m tests.bench.peers ENGINE MODEL PORT FRONT``.

Behind Serve each is one replica with two threads and ``serve.batch`` (16 requests, 2 ms), as Ray's documentation has
it; FRONT is ``proxy`` (Serve's default) or ``haproxy``.
"""

# No `from __future__ import annotations`: Serve ships the ingress class by value, and FastAPI could not resolve names.

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from starlette.requests import Request  # FastAPI looks annotations up in the module
from starlette.responses import JSONResponse

THREADS = 2
NEEDS = {"pipeline": "transformers", "openvino": "openvino", "onnxruntime": "onnxruntime"}

Run = Callable[[Any, Any, Any], Any]
"""input_ids, attention_mask, token_type_ids, int64 ``[B, S]`` -> logits ``[B, L]``."""


def missing(engine: str) -> str | None:
    """Which package ``engine`` (openvino-bf16, say) lacks here."""
    package = NEEDS[engine.partition("-")[0]]
    return None if find_spec(package) else package


def make(engine: str, model: Path) -> Run:
    """``engine`` loaded with ``model``, on two threads."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(THREADS)
    name, _, dtype = engine.partition("-")
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()
    if name == "pipeline":
        stock = stock.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])

        def eager(ids: Any, mask: Any, types: Any) -> Any:
            with torch.inference_mode():
                inputs = (torch.as_tensor(x) for x in (ids, mask, types))
                return stock(**dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=True))).logits

        return eager
    example = torch.full((2, 16), 7)
    inputs = {
        "input_ids": example,
        "attention_mask": torch.ones_like(example),
        "token_type_ids": torch.zeros_like(example),
    }
    if name == "openvino":
        return _openvino(stock, inputs, dtype)
    return _onnxruntime(stock, inputs)


def _openvino(stock: Any, inputs: dict[str, Any], dtype: str) -> Run:
    import openvino

    stock.config.return_dict = False
    converted = openvino.convert_model(stock, example_input=inputs)
    converted.reshape({port: openvino.PartialShape([-1, -1]) for port in converted.inputs})
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    request = compiled.create_infer_request()
    order = [next(iter(port.names)) for port in compiled.inputs]

    def run(ids: Any, mask: Any, types: Any) -> Any:
        named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        values = [np.asarray(named[name]) for name in order] if set(order) == set(named) else [ids, mask, types]
        return request.infer([np.asarray(v) for v in values])[compiled.output(0)]

    return run


def _onnxruntime(stock: Any, inputs: dict[str, Any]) -> Run:
    import onnxruntime
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
        program = torch.onnx.export(
            stock, kwargs=inputs, dynamo=True, verbose=False, dynamic_shapes={n: {0: batch, 1: length} for n in inputs}
        )
        assert program is not None
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def run(ids: Any, mask: Any, types: Any) -> Any:
        named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return session.run(None, {name: np.asarray(named[name]) for name in names})[0]

    return run


def serve_peer(engine: str, model: Path, port: int, front: str) -> None:
    """Serve ``engine`` on loopback until this process is ended; prints Ready."""
    from tpray.config import stay_quiet
    from tpray.local_ray.local import start_ray, stop_ray
    from tpray.platforms.lease import SERVER_PORTS, take_ports
    from tpray.serving import haproxy

    stay_quiet()
    folder, ports = Path(tempfile.mkdtemp(prefix="tpray-bench-")), take_ports(haproxy.PORTS, SERVER_PORTS)
    if front == "haproxy":
        os.environ.update(haproxy.places(folder, ports.ids, "peer", {}) | haproxy.settings(60))
    start_ray(os.cpu_count() or 1, folder, ports)
    from ray import serve

    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(_application(engine, str(model)), route_prefix="/")
        print("Ready", flush=True)
        sys.stdin.read()  # ends with whoever started this
    finally:
        stop_ray()


def _application(engine: str, model: str) -> Any:
    from fastapi import FastAPI
    from ray import serve

    api = FastAPI()

    @serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=256)
    @serve.ingress(api)
    class Peer:
        def __init__(self) -> None:
            from transformers import AutoTokenizer, pipeline

            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.pipe = self.run = None
            if engine.startswith("pipeline"):
                import torch

                torch.set_num_threads(THREADS)
                dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.partition("-")[2]]
                self.pipe = pipeline("text-classification", model=model, dtype=dtype, top_k=None)
            else:
                self.run = make(engine, Path(model))

        @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002)
        async def classify(self, inputs: list[Any]) -> list[Any]:
            # On a thread: HAProxy takes a replica whose event loop does not answer for dead.
            return await asyncio.to_thread(self.compute, inputs)

        def compute(self, inputs: list[Any]) -> list[Any]:
            if self.pipe is not None:
                texts = [{"text": a, "text_pair": b} for a, b in inputs]
                answers: list[Any] = self.pipe(texts, batch_size=len(texts))
                return answers
            assert self.run is not None
            encoded = self.tokenizer([a for a, _ in inputs], [b for _, b in inputs], padding=True, return_tensors="np")
            logits = np.asarray(
                self.run(encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"]), dtype=np.float32
            )
            exponents = np.exp(logits - logits.max(-1, keepdims=True))
            scores = exponents / exponents.sum(-1, keepdims=True)
            return [[{"label": f"LABEL_{i}", "score": float(s)} for i, s in enumerate(row)] for row in scores]

        @api.post("/predict")
        async def predict(self, request: Request) -> JSONResponse:
            return JSONResponse(await self.classify((await request.json())["inputs"]))

    return cast(serve.Deployment, Peer).bind()  # a checker takes a decorated class for the class


if __name__ == "__main__":
    serve_peer(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
