"""A rank whose weights change in memory: real programs, real bits. It is noticed, and the group is built anew."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.served import start
from tests.serving.test_serve import OFFICE, PLACE
from tpray.artifacts.folder import rank_folder
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import LogitsError
from tpray.group.classifier import ClassifierGroup
from tpray.group.lifecycle import State
from tpray.group.thread_executor import ThreadExecutor
from tpray.runtime.cpu.runtime import CpuProgram
from tpray.runtime.exported import WEIGHTS_FILE
from tpray.serving import canary_watch
from tpray.serving.engine import Engine
from tpray.serving.http import make_app
from tpray.serving.scores import RAW

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
FOUND = "no longer gives the answers of its start"


def program_of(executor: ThreadExecutor, rank: int) -> CpuProgram:
    program = executor.workers[rank]._program
    assert isinstance(program, CpuProgram)
    return program


def tensors_of(executor: ThreadExecutor, rank: int) -> Iterator[torch.Tensor]:
    """What the padded program of a rank has bound, in the order of its calls."""
    for value in program_of(executor, rank).padded.run.__globals__.values():
        yield from (x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, torch.Tensor))


def flip(executor: ThreadExecutor, rank: int, dtype: str, bit: int) -> None:
    """Flip a bit of one weight in the memory of a rank: in its first prepacked matrix, which oneDNN lays out."""
    matrix = next(tensor for tensor in tensors_of(executor, rank) if tensor.is_mkldnn)
    address = torch.ops.mkldnn.data_ptr(matrix) + matrix.numel() // 2 * ITEM_BYTES[dtype] + bit // 8
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 1 << bit % 8


def with_engine(
    checkpoint: Path, dtype: str, work: Callable[[Engine, ThreadExecutor], Awaitable[None]], canary_interval_s: float
) -> None:
    async def run() -> None:
        executor = ThreadExecutor(2)
        group = ClassifierGroup(ModelConfig.model_validate({"source": str(checkpoint), "dtype": dtype}), executor)
        engine = Engine(group, BatchConfig(canary_interval_s=canary_interval_s))
        await engine.start()
        try:
            await asyncio.wait_for(work(engine, executor), 60)
        finally:
            await engine.stop()

    asyncio.run(run())


async def until_restarted(engine: Engine) -> None:
    while engine.restarts == 0 or engine.group.lifecycle.state is not State.READY:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("dtype", "bit"),
    [
        ("float32", 30),  # of the exponent: 2**128 times as large
        ("float32", 16),  # of the mantissa, a change by less than a hundredth
        ("bfloat16", 6),  # the mantissa's highest: less than the dtype's own error makes of the logits
        ("int8", 5),
    ],
)
def test_deep_health_finds_a_flipped_bit_and_the_group_is_built_anew(
    dtype: str, bit: int, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_watch, "RECENT_S", 0.0)

    async def work(engine: Engine, executor: ThreadExecutor) -> None:
        transport = httpx.ASGITransport(make_app(engine), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
            before = (await engine.classify(["a b", "c d e"], RAW)).scores
            for sound in ("/health", "/health?deep", "/health?deep=true", "/health?deep=0"):
                assert (await http.get(sound)).status_code == 200
            flip(executor, 1, dtype, bit)
            assert (await http.get("/health")).status_code == 200, "it looks at no logits"
            found = await http.get("/health?deep")
            assert found.status_code == 503
            assert FOUND in found.json()["error"]
            print(f"\n{dtype}, bit {bit}: {found.json()['error']}")
            await until_restarted(engine)
            assert (await engine.classify(["a b", "c d e"], RAW)).scores == before
            assert (await http.get("/health?deep")).status_code == 200
            assert engine.restarts == 1

    with_engine(make_checkpoint("bert"), dtype, work, canary_interval_s=0)


def test_an_idle_group_finds_a_flipped_bit_by_itself(
    make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    async def work(engine: Engine, executor: ThreadExecutor) -> None:
        before = (await engine.classify(["a b"])).scores
        await asyncio.sleep(0.6)
        assert engine.restarts == 0, "sound ranks are left alone"
        flip(executor, 0, "float32", 28)
        await until_restarted(engine)
        assert (await engine.classify(["a b"])).scores == before
        assert engine.restarts == 1

    with caplog.at_level(logging.WARNING):
        with_engine(make_checkpoint("bert"), "float32", work, canary_interval_s=0.2)
    assert FOUND in caplog.text


def test_a_row_whose_logits_are_not_finite_has_the_weights_looked_at(make_checkpoint: Callable[..., Path]) -> None:
    async def work(engine: Engine, executor: ThreadExecutor) -> None:
        before = (await engine.classify(["a b"])).scores
        (bias,) = (x for x in tensors_of(executor, 0) if not x.is_mkldnn and x.is_floating_point() and x.shape == (3,))
        bias[0] = float("nan")
        with pytest.raises(LogitsError):
            await engine.classify(["a b"])
        await until_restarted(engine)
        assert (await engine.classify(["a b"])).scores == before

    with_engine(make_checkpoint("bert"), "float32", work, canary_interval_s=0)


def flip_in_process(pid: int, weights: bytes, bit: int) -> int:
    """Flip a bit of the first float32 of ``weights``, wherever they are in the memory of a process: in how many places.

    Source: proc_pid_mem(5); what is mapped from a file is changed for this process alone.
    """
    found = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, *_ = line.split()
            begin, end = (int(address, 16) for address in span.split("-"))
            if permissions[0] != "r" or permissions[3] != "p" or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            memory.seek(begin)
            try:
                held = memory.read(end - begin)
            except OSError:  # a page of a device
                continue
            place = held.find(weights)
            while place >= 0:
                memory.seek(begin + place + bit // 8)
                memory.write(bytes([weights[bit // 8] ^ 1 << bit % 8]))
                found += 1
                place = held.find(weights, place + 1)
    return found


@pytest.mark.ray
@pytest.mark.nightly
def test_a_flipped_bit_in_the_process_of_a_rank_costs_no_restart_of_the_server(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    server = start(free_port(), tmp_path, "--tp", "2", "--dtype", "float32")
    try:
        asked = {"inputs": [[PLACE, OFFICE], ["a", "b"]], "raw_scores": True}
        before = server.predict(asked).json()
        info = server.info()
        pid = info["ranks"][1]["pid"]
        tensors = load_file(Path(info["artifact"], rank_folder(1), WEIGHTS_FILE))
        name = next(name for name in tensors if name.endswith("layer.0.output.LayerNorm.weight"))
        assert httpx.get(f"{server.url}/health?deep", timeout=60).status_code == 200
        try:
            assert flip_in_process(pid, tensors[name].numpy().tobytes(), bit=26) >= 1
        except PermissionError as e:
            pytest.skip(f"this machine lets no process change another's memory: {e}")
        time.sleep(1.1)  # what was checked within the last second is not checked again
        found = httpx.get(f"{server.url}/health?deep", timeout=60)
        assert found.status_code == 503
        assert FOUND in found.json()["error"]
        assert server.predict(asked).json() == before, "by the ranks that were started again"
        assert httpx.get(f"{server.url}/health?deep", timeout=60).status_code == 200
        after = server.info()
        assert after["restarts"] == 1
        assert pid not in [rank["pid"] for rank in after["ranks"]]
        assert server.process.poll() is None
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
