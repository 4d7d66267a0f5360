"""The stand-ins' rules: each, broken by a process of its own, is an error that names it; what is allowed, works."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.neuron_standin import environment

RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
GROUP = RANK | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "NEURON_RT_VISIBLE_CORES": "0"}
FAIL = {"NEURON_STANDIN_FAIL_EXECUTION": "1"}

IMPORT = "import os, torch, torch.distributed as dist, torch_neuronx\nfrom torch import nn\n"
JOIN = "dist.init_process_group('neuron', rank=0, world_size=1, store=dist.HashStore())\n"
EXECUTE = "x = torch.compile(lambda x: x * 2, backend='neuron')(torch.ones(2))\n"
ALL_GOOD = "assert x.device.type == 'neuron' and x.to('cpu').tolist() == [2, 2]\n"
COMPILE = "run = torch.compile(nn.Linear(2, 2).eval().to('neuron'), backend='neuron', fullgraph=True, dynamic=False)\n"
TRACE = (
    "example = (torch.ones(1, 2),)\nmodel = nn.Linear(2, 2).eval()\n"
    "traced = torch_neuronx.trace(model, example, cpu_backend=True, compiler_args=['--target=trn1'])\n"
)
SAVE = TRACE + "torch.jit.save(traced, os.environ['NEURON_STANDIN_DIR'] + '/m.pt')\n"
LOAD = SAVE + (
    "with torch_neuronx.contexts.disable_nrt_load():\n"
    "    m = torch.jit.load(os.environ['NEURON_STANDIN_DIR'] + '/m.pt')\n"
)
CORE = {"PJRT_DEVICE": "CPU", "NEURON_RT_VISIBLE_CORES": "0"}
BIND = "torch.ops.neuron._load_collectives_neuron(m.model, 0, 1, 0, 1)\n"


FORKING = """
import json, os, signal, sys, traceback
import torch, torch._dynamo, torch.distributed
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    environ, code, target = json.loads(line)
    if os.fork():
        continue
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(environ["NEURON_STANDIN_DIR"])
    sys.path[:0] = environ["PYTHONPATH"].split(os.pathsep)
    with open(target + ".part", "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            exec(code, {})
            print("no error", flush=True)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os.rename(target + ".part", target)
    os._exit(0)
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, neuron_device: Path) -> Iterator[Run]:
    """A function that runs code in a process of its own, forked off one that has imported torch; what it printed."""
    folder = tmp_path_factory.mktemp("standins")
    number = itertools.count()
    forking = subprocess.Popen([sys.executable, "-c", FORKING], stdin=subprocess.PIPE, text=True)
    assert forking.stdin is not None
    requests = forking.stdin

    def run(runtime: str, code: str, variables: dict[str, str], claims: Path) -> str:
        own = {name: value for name, value in os.environ.items() if not name.startswith("NEURON")}
        own |= environment(runtime, claims, neuron_device)
        own |= {f"TORCH_NEURONX_NEFF_{name}CACHE_DIR": str(claims / f"{name}neff") for name in ("", "LOCAL_")}
        target = folder / str(next(number))
        requests.write(json.dumps([own | variables, IMPORT + code, str(target)]) + "\n")
        requests.flush()
        give_up = time.monotonic() + 120
        while not target.exists():
            assert time.monotonic() < give_up, "the process does not end"
            time.sleep(0.02)
        return target.read_text().strip()

    yield run
    requests.close()
    forking.wait(timeout=60)


@pytest.mark.parametrize(
    ("code", "variables", "words"),
    [
        ("torch.ones(2).to('neuron')\n" + JOIN, GROUP, "initialised before init_process_group"),
        (JOIN, GROUP | {"NEURON_RT_VISIBLE_CORES": "8"}, "there are 8 cores"),
        (JOIN, GROUP | {"NEURON_RT_VISIBLE_CORES": "0-1"}, "a process of a group has one core"),
        (JOIN.replace("=1", "=2"), GROUP | {"NEURON_RT_ROOT_COMM_ID": ""}, "NEURON_RT_ROOT_COMM_ID is not set"),
        (JOIN + "torch.ones(1, device='neuron:0')\n", GROUP | {"LOCAL_RANK": "1"}, "there is no neuron:0"),
        (JOIN + COMPILE.replace("False)", "True)") + "run(torch.ones(3, 2).to('neuron'))\n", GROUP, "static shapes"),
        (JOIN + "import torch.distributed._functional_collectives as f\n"
         "torch.compile(lambda x: f.broadcast(x, 0, dist.group.WORLD), backend='neuron')(torch.ones(2).to('neuron'))\n",
         GROUP, "unsupported operator _c10d_functional.broadcast"),
        (JOIN + EXECUTE, GROUP | {"PATH": "/usr/bin"}, "there is no neuronx-cc on PATH"),
        (JOIN + EXECUTE, GROUP | FAIL | {"TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1"}, "nrt_execute failed"),
    ],
)  # fmt: skip
def test_torchneuron(code: str, variables: dict[str, str], words: str, run: Run, tmp_path: Path) -> None:
    assert words in run("neuron", code, variables, tmp_path)


@pytest.mark.parametrize(
    ("code", "variables"),
    [
        (JOIN + COMPILE + "run(torch.ones(1, 2).to('neuron')).to('cpu')\n", GROUP),
        (JOIN + EXECUTE + ALL_GOOD, GROUP),  # its input is on the CPU
        (JOIN + "x = torch.ones(2).to('neuron')\nx = x + x\n" + ALL_GOOD, GROUP),  # outside of a compiled program
        (JOIN, GROUP | {"NEURON_RT_NUM_CORES": "4"}),
        (JOIN, GROUP | {"TORCHELASTIC_RUN_ID": "x"}),
        ("os.environ['NEURON_RT_VISIBLE_CORES'] = '0'\n" + JOIN, GROUP | {"NEURON_RT_VISIBLE_CORES": "8"}),
        (JOIN, {}),
        (JOIN + EXECUTE + ALL_GOOD, GROUP | FAIL),  # silently, on the CPU
    ],
)  # fmt: skip
def test_what_torchneuron_allows(code: str, variables: dict[str, str], run: Run, tmp_path: Path) -> None:
    assert run("neuron", code, variables, tmp_path).endswith("no error")
    assert (tmp_path / "nc-0").is_file(), "it has taken its core"


BOTH = """
import threading
left, opened = threading.Event(), threading.Event()
def other():
    with torch_neuronx.contexts.disable_nrt_load():
        opened.wait()
    left.set()
threading.Thread(target=other).start()
with torch_neuronx.contexts.disable_nrt_load():
    opened.set()
    left.wait()
    torch.jit.load(os.environ['NEURON_STANDIN_DIR'] + '/m.pt')
"""


@pytest.mark.xla
@pytest.mark.parametrize(
    ("code", "variables", "words"),
    [
        (LOAD + BIND + "m(*example)\n", CORE, "no error"),
        (LOAD + BIND + "torch_neuronx.move_trace_to_device(m, 0)\nm(*example)\n", CORE, "no error"),
        (SAVE + "torch.jit.load(os.environ['NEURON_STANDIN_DIR'] + '/m.pt')\n", CORE, "disable_nrt_load"),
        (SAVE + BOTH, CORE, "disable_nrt_load"),
        (LOAD + "m(*example)\n", CORE, "not loaded with its collectives"),
        (LOAD + BIND.replace("0, 1, 0, 1", "3, 1, 0, 1"), CORE, "core 3 of 1"),
        (LOAD + BIND.replace("m.model", "m"), CORE, "takes the traced module's .model"),
        (LOAD + BIND.replace("0, 1, 0, 1", "0, 1, 0, 2"), CORE, "NEURON_RT_ROOT_COMM_ID is not set"),
        (TRACE.replace("'--target=trn1'", ""), CORE, "takes the family of the cores"),
        (TRACE, CORE | {"NEURON_LOGICAL_NC_CONFIG": "2"}, "NCC_EARG001"),
        (TRACE.replace("=trn1'", "=trn1', '--frobnicate'"), CORE, "unknown argument --frobnicate"),
        (TRACE.replace("nn.Linear(2, 2)", "nn.GELU()"), CORE, "Unsupported operator: erf"),
    ],
)  # fmt: skip
def test_torch_neuronx_on_xla(code: str, variables: dict[str, str], words: str, run: Run, tmp_path: Path) -> None:
    assert words in run("neuron-xla", code, variables, tmp_path)


def test_a_core_has_one_owner_until_that_ends(run: Run, tmp_path: Path) -> None:
    waits = "import time\nwhile not os.path.exists(os.environ['NEURON_STANDIN_DIR'] + '/end'):\n    time.sleep(0.02)\n"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, "neuron", JOIN + waits, GROUP, tmp_path)
        while not (tmp_path / "nc-0").exists() or not (tmp_path / "nc-0").read_text():
            assert not first.done(), first.result()
            time.sleep(0.02)
        assert "Logical Neuron Core(s) not available" in run("neuron", JOIN, GROUP, tmp_path)
        (tmp_path / "end").touch()
        assert first.result() == "no error"
    assert run("neuron", JOIN, GROUP, tmp_path) == "no error"


def test_ranks_in_different_collectives_are_named(run: Run, tmp_path: Path) -> None:
    """Rank 0 all-reduces [2], rank 1 [3]: the device would hang."""
    code = (
        "rank = int(os.environ['RANK'])\nimport torch.distributed._functional_collectives as f\n"
        "dist.init_process_group('neuron', rank=rank, world_size=2, init_method='file://' + "
        "os.environ['NEURON_STANDIN_DIR'] + '/meet')\n"
        "run = torch.compile(lambda x: f.all_reduce(x, 'sum', dist.group.WORLD), backend='neuron', fullgraph=True, "
        "dynamic=False)\nrun(torch.ones(2 + rank).to('neuron'))\n"
    )
    root = {"NEURON_RT_ROOT_COMM_ID": "127.0.0.1:61998", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def rank(number: int) -> str:
        own = {"RANK": str(number), "LOCAL_RANK": str(number), "NEURON_RT_VISIBLE_CORES": str(number)}
        return run("neuron", code, GROUP | root | own, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        for said in pool.map(rank, range(2)):
            assert "the ranks are in different collectives" in said
