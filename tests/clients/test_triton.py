"""Triton's own clients ask, over HTTP and gRPC; what they get is what stock transformers gives."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import uvicorn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tpray.config import AccessConfig, BatchConfig, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.group.thread_executor import ThreadExecutor
from tpray.serving.access import Access
from tpray.serving.door import NONE
from tpray.serving.engine import Engine
from tpray.serving.gate import Gate
from tpray.serving.http import make_app
from tpray.serving.keys import KeyRing, parse
from tpray.serving.model_names import ModelNames
from tpray.serving.oip.service import GRPC, OpenInferenceService

Make = Callable[..., Path]
TEXTS = ["the firm is in Paris", "x", "Ça n'est pas vrai: apples"]
PAIRS = ["the company is not", "the firm " * 4, "é"]


class TritonsMessages(OpenInferenceService, service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The service with the messages that Triton's client brings: a process can have those of one name once."""

    _messages = service_pb2


async def start_grpc(
    engine: Engine, served: tuple[str, ...] = (), access: Access | None = None
) -> tuple[grpc.aio.Server, str]:
    """A gRPC server of an engine, without Serve, and its address."""
    server, service = grpc.aio.server(), TritonsMessages()
    service.open_service(engine, Gate(), ModelNames(served, engine.codec.record.source), access or Access())
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@contextmanager
def served(directory: Path, free_port: Callable[[], int]) -> Iterator[tuple[str, str]]:
    """The addresses, of HTTP and of gRPC, of the model in ``directory``: two ranks in this process, on a thread."""
    port, up = free_port(), Future[tuple[str, Callable[[], object]]]()

    async def main() -> None:
        group = ClassifierGroup(ModelConfig(source=str(directory), dtype="float32"), ThreadExecutor(2))
        engine = Engine(group, BatchConfig(max_client_batch_size=8))
        await engine.start()
        server = uvicorn.Server(uvicorn.Config(make_app(engine), port=port, log_level="warning"))
        loop = asyncio.get_running_loop()
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        rpc, address = await start_grpc(engine)
        up.set_result((address, lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)))
        await serving
        await rpc.stop(1)
        await engine.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as e:
            if not up.done():
                up.set_exception(e)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    address, end = up.result(120)
    try:
        yield f"127.0.0.1:{port}", address
    finally:
        end()
        thread.join(60)


@pytest.fixture(scope="module")
def directory(make_checkpoint: Make) -> Path:
    return make_checkpoint("bert", num_labels=3, id2label={0: "bad", 1: "so:so", 2: "good"})


@pytest.fixture(scope="module")
def addresses(
    directory: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPRAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        with served(directory, free_port) as found:
            yield found


@pytest.fixture(scope="module")
def client(addresses: tuple[str, str]) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(addresses[0])


@pytest.fixture(scope="module")
def rpc(addresses: tuple[str, str]) -> triton_grpc.InferenceServerClient:
    return triton_grpc.InferenceServerClient(addresses[1])


def stock_logits(directory: Path, texts: list[str], pairs: list[str] | None = None) -> np.ndarray:
    """What transformers gives for each by itself."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    rows = []
    for number, text in enumerate(texts):
        encoded = tokenizer(text, None if pairs is None else pairs[number], return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**encoded).logits[0].numpy())
    return np.stack(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(logits), -1).numpy()


def of_texts(name: str, texts: list[str], binary: bool, shape: tuple[int, ...] | None = None) -> triton.InferInput:
    values = np.array([text.encode() for text in texts], dtype=np.object_).reshape(shape or (len(texts),))
    made = triton.InferInput(name, values.shape, "BYTES")
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def of_tokens(name: str, values: np.ndarray, binary: bool, dtype: str = "INT64") -> triton.InferInput:
    made = triton.InferInput(name, values.shape, dtype)
    made.set_data_from_numpy(values.astype(np.int64 if dtype == "INT64" else np.int32), binary_data=binary)
    return made


def test_the_server_and_its_model(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("anything")
    assert client.is_model_ready("org/name", "1")
    assert not client.is_model_ready("anything", "2")
    assert client.get_server_metadata()["name"] == "tpray"
    metadata = client.get_model_metadata("org/name", "1")
    assert (metadata["name"], metadata["versions"]) == ("org/name", ["1"])
    assert [each["name"] for each in metadata["inputs"]] == [
        "text", "text_pair", "input_ids", "attention_mask", "token_type_ids",
    ]  # fmt: skip
    assert metadata["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 3]}
    with pytest.raises(InferenceServerException, match="no configuration, statistics"):
        client.get_model_config("anything")
    with pytest.raises(InferenceServerException, match="has no version '2' here") as caught:
        client.get_model_metadata("anything", "2")
    assert caught.value.status() == "404"


def test_the_readmes_lines(addresses: tuple[str, str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "tritonclient" in block]
    for module, address in (("tritonclient.http", addresses[0]), ("tritonclient.grpc", addresses[1])):
        said = io.StringIO()
        with redirect_stdout(said):
            exec(lines.replace("tritonclient.http", module).replace("127.0.0.1:8000", address), {})
        assert np.array(re.findall(r"0\.\d+", said.getvalue())).size == 6


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_texts_and_pairs(
    client: triton.InferenceServerClient, directory: Path, pairs: list[str] | None, binary: bool
) -> None:
    expected = stock_logits(directory, TEXTS, pairs)
    inputs = [of_texts("text", TEXTS, binary)]
    if pairs is not None:
        inputs.append(of_texts("text_pair", pairs, binary, (3, 1)))
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "logits")]
    answer = client.infer("anything", inputs, outputs=outputs, request_id="7")
    assert answer.get_response()["id"] == "7"
    assert [each["name"] for each in answer.get_response()["outputs"]] == ["probabilities", "logits"]
    np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(answer.as_numpy("probabilities"), softmax(expected), atol=1e-5, rtol=0)
    everything = client.infer("anything", inputs, "1")
    np.testing.assert_array_equal(everything.as_numpy("logits").dtype, np.float32)
    np.testing.assert_allclose(everything.as_numpy("logits"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("binary", "dtype"), [(True, "INT64"), (False, "INT64"), (True, "INT32")])
def test_rows_of_tokens_of_different_lengths(
    client: triton.InferenceServerClient, directory: Path, binary: bool, dtype: str
) -> None:
    encoded = AutoTokenizer.from_pretrained(directory)(TEXTS, PAIRS, padding=True, return_tensors="np")
    assert 0 in encoded["attention_mask"]
    inputs = [of_tokens(name, np.asarray(values), binary, dtype) for name, values in encoded.items()]
    answer = client.infer("anything", inputs)
    np.testing.assert_allclose(answer.as_numpy("logits"), stock_logits(directory, TEXTS, PAIRS), atol=1e-5, rtol=0)
    alone = client.infer("anything", [of_tokens("input_ids", np.asarray(encoded["input_ids"])[1:2, :4], binary, dtype)])
    assert alone.as_numpy("probabilities").shape == (1, 3)


@pytest.mark.parametrize("binary", [True, False])
def test_the_classification_extension(client: triton.InferenceServerClient, directory: Path, binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
    answer = client.infer("anything", [of_texts("text", TEXTS, binary=True)], outputs=outputs)
    found = answer.as_numpy("probabilities")
    assert found.shape == (3, 2)
    for row, expected in zip(found, softmax(stock_logits(directory, TEXTS)), strict=True):
        best = np.argsort(-expected)[:2]
        said = [(each.decode() if isinstance(each, bytes) else each).split(":", 2) for each in row]
        assert [int(index) for _, index, _ in said] == best.tolist()
        assert [label for _, _, label in said] == [["bad", "so:so", "good"][i] for i in best]
        np.testing.assert_allclose([float(value) for value, _, _ in said], expected[best], atol=1e-5, rtol=0)


def test_too_long_is_refused_or_cut(client: triton.InferenceServerClient, directory: Path) -> None:
    long = "the firm is in Paris " * 200
    with pytest.raises(InferenceServerException, match=r"item 0 has .* tokens and this model takes"):
        client.infer("anything", [of_texts("text", [long], binary=True)], parameters={"truncation": False})
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for said, side in (({}, "right"), ({"truncation": True}, "right"), ({"truncation": "left"}, "left")):
        tokenizer.truncation_side = side
        with torch.no_grad():
            limit = model.config.max_position_embeddings
            expected = model(**tokenizer(long, truncation=True, max_length=limit, return_tensors="pt")).logits.numpy()
        answer = client.infer("anything", [of_texts("text", [long], binary=True)], parameters=said)
        np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-5, rtol=0)


def test_what_is_wrong_is_named(client: triton.InferenceServerClient) -> None:
    text, many = of_texts("text", ["a"], binary=True), of_texts("text", ["a"] * 9, binary=False)
    other = of_texts("sentence", ["a"], binary=True)
    ids = of_tokens("input_ids", np.array([[1, 10_000]]), binary=True)
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([other], {}, "there is no input `sentence`: there are `text`"),
        ([text, ids], {}, "send either text or input_ids"),
        ([many], {}, "the inputs have 9 rows and the limit is 8"),
        ([ids], {}, "item 0 has the token id 10000, and this model knows 0 to"),
        ([text], {"parameters": {"colour": 1}}, "the parameter `colour` is not known here"),
        ([text], {"priority": 3}, "the parameter `priority` is not known here"),
        ([text], {"parameters": {"truncation": "up"}}, "send true, false, left or right"),
        ([text], {"outputs": [triton.InferRequestedOutput("scores")]}, "there is no output `scores`"),
        ([text], {"model_version": "3"}, "has no version '3' here"),
        ([text], {"timeout": 1}, "time ran out"),
        ([text], {"request_compression_algorithm": "gzip"}, "Content-Encoding: send it as it is"),
    ]
    for inputs, options, words in cases:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("anything", inputs, **options)
        assert words in str(caught.value)
    assert client.infer("anything", [text], timeout=5_000_000).as_numpy("logits").shape == (1, 3)


def over_grpc(name: str, values: np.ndarray, datatype: str) -> triton_grpc.InferInput:
    made = triton_grpc.InferInput(name, values.shape, datatype)
    made.set_data_from_numpy(values)
    return made


def texts_over_grpc(name: str, texts: list[str]) -> triton_grpc.InferInput:
    return over_grpc(name, np.array([text.encode() for text in texts], dtype=np.object_), "BYTES")


def test_grpc_gives_the_same(rpc: triton_grpc.InferenceServerClient, directory: Path) -> None:
    assert rpc.is_server_live()
    assert rpc.is_server_ready()
    assert rpc.is_model_ready("anything", "1")
    assert rpc.get_server_metadata().name == "tpray"
    metadata = rpc.get_model_metadata("anything")
    assert [(each.name, list(each.shape)) for each in metadata.outputs] == [
        ("logits", [-1, 3]), ("probabilities", [-1, 3]),
    ]  # fmt: skip
    expected = stock_logits(directory, TEXTS, PAIRS)
    inputs = [texts_over_grpc("text", TEXTS), texts_over_grpc("text_pair", PAIRS)]
    answer = rpc.infer("anything", inputs, request_id="7", parameters={"truncation": True})
    assert answer.get_response().id == "7"
    np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(answer.as_numpy("probabilities"), softmax(expected), atol=1e-5, rtol=0)
    encoded = AutoTokenizer.from_pretrained(directory)(TEXTS, PAIRS, padding=True, return_tensors="np")
    for datatype, dtype in (("INT64", np.int64), ("INT32", np.int32)):
        inputs = [over_grpc(name, np.asarray(values).astype(dtype), datatype) for name, values in encoded.items()]
        wanted = triton_grpc.InferRequestedOutput
        answer = rpc.infer("anything", inputs, outputs=[wanted("logits")])
        assert [each.name for each in answer.get_response().outputs] == ["logits"]
        np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-5, rtol=0)
        named = rpc.infer("anything", inputs, outputs=[wanted("logits", class_count=1)]).as_numpy("logits")
        assert [int(each[0].split(b":")[1]) for each in named] == expected.argmax(1).tolist()


def test_grpc_takes_and_gives_typed_contents(addresses: tuple[str, str], directory: Path) -> None:
    """As KServe's clients send; Triton's sends raw ones."""
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="text", datatype="BYTES", shape=[3]).contents.bytes_contents.extend(
        text.encode() for text in TEXTS
    )
    with grpc.insecure_channel(addresses[1]) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        logits = ask(request).outputs[0]
        assert (logits.name, logits.datatype, list(logits.shape)) == ("logits", "FP32", [3, 3])
        found = np.array(logits.contents.fp32_contents, dtype=np.float32).reshape(3, 3)
        np.testing.assert_allclose(found, stock_logits(directory, TEXTS), atol=1e-5, rtol=0)
        request.outputs.add(name="probabilities").parameters["classification"].int64_param = 2
        (named,) = ask(request).outputs
        assert (named.datatype, list(named.shape), len(named.contents.bytes_contents)) == ("BYTES", [3, 2], 6)
        request.raw_input_contents.append(b"")
        with pytest.raises(grpc.RpcError, match="contents beside raw_input_contents"):
            ask(request)
        ids = service_pb2.ModelInferRequest(model_name="m")
        ids.inputs.add(name="input_ids", datatype="INT64", shape=[1, 1]).contents.int_contents.append(1)
        with pytest.raises(grpc.RpcError, match="is INT64 and has int_contents: send int64_contents"):
            ask(ids)


def test_grpc_names_what_is_wrong_with_a_code(rpc: triton_grpc.InferenceServerClient) -> None:
    text = texts_over_grpc("text", ["a"])
    cases: list[tuple[Any, dict[str, Any], str, str]] = [
        (texts_over_grpc("sentence", ["a"]), {}, "INVALID_ARGUMENT", "there is no input `sentence`"),
        (texts_over_grpc("text", [""]), {}, "INVALID_ARGUMENT", "item 0 is empty: send some text"),
        (texts_over_grpc("text", ["a"] * 9), {}, "RESOURCE_EXHAUSTED", "9 rows and the limit is 8"),
        (texts_over_grpc("text", ["a" * 2_000_001]), {}, "RESOURCE_EXHAUSTED", "larger than 2000000 bytes"),
        (text, {"model_version": "2"}, "NOT_FOUND", "has no version '2' here"),
        (text, {"timeout": 1}, "DEADLINE_EXCEEDED", "time ran out"),
        (text, {"priority": 2}, "INVALID_ARGUMENT", "the parameter `priority` is not known here"),
    ]
    for given, options, code, words in cases:
        with pytest.raises(InferenceServerException) as caught:
            rpc.infer("anything", [given], **options)
        assert caught.value.status() == f"StatusCode.{code}"
        assert words in caught.value.message()
    for ask in (rpc.get_model_config, rpc.get_inference_statistics):
        with pytest.raises(InferenceServerException, match="here: ask for") as caught:
            ask("anything")
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_grpc_ends_what_its_client_waits_for_no_longer() -> None:
    """A deadline needs no code of ours; names, and a group that is gone, have their codes."""
    from tritonclient.grpc.aio import InferenceServerClient

    async def run() -> None:
        executor = FakeExecutor(2)
        engine = Engine(ClassifierGroup(ModelConfig(dtype="float32"), executor, 5.0), BatchConfig())
        await engine.start()
        server, address = await start_grpc(engine, ("ours",))
        async with InferenceServerClient(address) as rpc:
            await rpc.infer("ours", [texts_over_grpc("text", ["a"])])
            with pytest.raises(InferenceServerException, match="does not exist here: ask for `ours`") as caught:
                await rpc.infer("theirs", [texts_over_grpc("text", ["a"])])
            assert caught.value.status() == "StatusCode.NOT_FOUND"
            executor.hang(1)
            asked = [asyncio.ensure_future(rpc.infer("ours", [texts_over_grpc("text", ["a"])], client_timeout=0.5))]
            asked += [asyncio.ensure_future(rpc.infer("ours", [texts_over_grpc("text", ["b"])], client_timeout=0.5))]
            for late in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(late, InferenceServerException)
                assert late.status() == "StatusCode.DEADLINE_EXCEEDED"
            await asyncio.sleep(0.1)
            assert engine.queued_tokens == 0
            await engine.stop()
            with pytest.raises(InferenceServerException, match="the group was stopped") as caught:
                await rpc.infer("ours", [texts_over_grpc("text", ["a"])])
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
            assert not await rpc.is_server_ready()
        await server.stop(0)

    asyncio.run(run())


def test_grpc_asks_for_the_keys_of_http() -> None:
    """Beside the token of a server on one machine; whether it is there may be asked without, as over HTTP."""
    from tritonclient.grpc.aio import InferenceServerClient

    async def run() -> None:
        engine = Engine(ClassifierGroup(ModelConfig(dtype="float32"), FakeExecutor(2), 5.0), BatchConfig())
        await engine.start()
        access = Access(AccessConfig(), KeyRing(parse(["alice: alice-0123456789 requests=1/min"], "test")))
        server, address = await start_grpc(engine, access=access)
        async with InferenceServerClient(address) as rpc:
            assert await rpc.is_server_live()
            assert await rpc.is_server_ready()
            for headers, code, words in (
                ({}, "UNAUTHENTICATED", "this server asks for a key"),
                ({"authorization": "Bearer bob-0123456789"}, "UNAUTHENTICATED", "this key is not known here"),
                ({"authorization": "Bearer alice-0123456789"}, "", ""),
                ({"authorization": "Bearer alice-0123456789"}, "RESOURCE_EXHAUSTED", "its 1 requests a minute"),
            ):
                asked = rpc.infer("m", [texts_over_grpc("text", ["a"])], headers=headers)
                if not code:
                    assert (await asked).as_numpy("logits").shape == (1, 2)
                    continue
                with pytest.raises(InferenceServerException, match=words) as caught:
                    await asked
                assert caught.value.status() == f"StatusCode.{code}"
            with pytest.raises(InferenceServerException, match="asks for a key"):
                await rpc.get_model_metadata("m")
        assert access.keys.usage()["alice"].tokens > 0
        counted = {
            (NONE, "OK", ""): 2, (NONE, "UNAUTHENTICATED", ""): 1, (GRPC, "UNAUTHENTICATED", ""): 2,
            (GRPC, "OK", "alice"): 1, (GRPC, "RESOURCE_EXHAUSTED", "alice"): 1,
        }  # fmt: skip
        assert engine.load.requests == counted
        assert engine.load.refusals == {"unauthorized": 3, "key_limit": 1}
        await server.stop(0)
        await engine.stop()

    asyncio.run(run())


@pytest.mark.slow  # the forms of a request are those of texts
def test_labels_of_tokens_have_the_places_of_the_input(make_checkpoint: Make, free_port: Callable[[], int]) -> None:
    directory = make_checkpoint("bert", architectures=["ForTokenClassification"], num_labels=4)
    encoded = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="np")
    model = AutoModelForTokenClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(values) for name, values in encoded.items()}).logits.numpy()
    mask = np.asarray(encoded["attention_mask"])
    expected[mask == 0] = 0
    with served(directory, free_port) as (address, _):
        client = triton.InferenceServerClient(address)
        answer = client.infer("m", [of_tokens(name, np.asarray(v), binary=True) for name, v in encoded.items()])
        np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(answer.as_numpy("probabilities")[mask == 1], softmax(expected[mask == 1]), atol=1e-5)
        with pytest.raises(InferenceServerException, match="send input_ids in place of text"):
            client.infer("m", [of_texts("text", TEXTS, binary=True)])
