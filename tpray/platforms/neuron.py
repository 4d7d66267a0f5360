"""AWS NeuronCores: their families, degrees, packages, and the environment of a process that uses them.

Two stacks carry the distribution name ``torch-neuronx``, and one environment holds one of them: TorchNeuron (2.13 and
newer: Trn2, Trn3) is the runtime ``neuron``; the XLA one (up to 2.9: Inf2, Trn1, Trn2) is ``neuron-xla``.

Sources: Neuron's runtime configuration guide (NEURON_RT_*) and runtime documentation (over which degrees collectives
run), TorchNeuron's environment variables (TORCH_NEURONX_*), torch-xla's ``_internal/neuron.py`` (TORCHELASTIC_RUN_ID),
https://docs.pytorch.org/docs/stable/elastic/run.html (RANK and its like).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tpray.config import AUTO, DtypeName, InstanceFamily, ParallelConfig, ProcessLayout
from tpray.config import environment as own_environment
from tpray.errors import ConfigError, DegreeError, UnsupportedModelError
from tpray.platforms.base import ProcessCores, Shape
from tpray.platforms.busy import BUSY_LIMIT_S, is_busy
from tpray.platforms.choose import MachineFacts
from tpray.platforms.memory import available_bytes

if TYPE_CHECKING:
    from tpray.platforms.topology import Topology

DMI = Path("/sys/devices/virtual/dmi/id/product_name")
DEVICES = Path("/dev")
FAMILIES: dict[str, InstanceFamily] = {"inf2": "inf2", "trn1": "trn1", "trn1n": "trn1", "trn2": "trn2", "trn2u": "trn2"}
STACKS: dict[InstanceFamily, tuple[str, ...]] = {
    "inf2": ("neuron-xla",),
    "trn1": ("neuron-xla",),
    "trn2": ("neuron", "neuron-xla"),
}
"""Which runtimes know the cores of a family, the better one first."""

DEGREES: dict[InstanceFamily, tuple[int, ...]] = {
    "inf2": (1, 2, 4, 8, 24),
    "trn1": (1, 2, 8, 16, 32),
    "trn2": (1, 2, 4, 8, 16, 32, 64),
}
"""Over how many NeuronCores a collective runs; Trn2's are logical cores of two physical ones."""

CORE_BYTES: dict[InstanceFamily, int] = {"inf2": 16 << 30, "trn1": 16 << 30, "trn2": 24 << 30}
"""Memory of a NeuronCore: half of a chip's 32 GiB; of Trn2 a quarter of 96, since its logical cores are of two.

Source: AWS Neuron's architecture pages of Inferentia2, Trainium and Trainium2.
"""
DEVICE_CORES: dict[InstanceFamily, int] = {"inf2": 2, "trn1": 2, "trn2": 4}
"""NeuronCores of a device; Trn2's logical ones."""

NOT_LOWERED = {
    "xlm": "torch 2.9 cannot export its check of the lengths",
    "flaubert": "torch 2.9 cannot export its check of the lengths",
    "convbert": "torch-xla cannot lower im2col, which its convolution is made of",
    "lilt": "torch-xla drops the last layer's collective for a layout that nothing reads",
    "xmod": "how many rows its adapters take depends on values, and a program's sizes are static",
}
"""Architectures that the XLA stack cannot trace, and why; by model type."""

PIP_REPOSITORY = "the Neuron pip repository that AWS's setup guide names"

COMPILER_BYTES = 8 << 30
"""Memory that one rank's compiler is given. A guess on the safe side: Neuron publishes no figure, and users ran out
of memory with all ranks at once (aws-neuron-sdk, issues 706 and 1014)."""

DEFAULT_BUCKETS: tuple[Shape, ...] = ((1, 128), (8, 128))
"""[B, S] that are traced when nobody says which: each takes minutes to compile."""


def instance_family(product: Path = DMI) -> InstanceFamily | None:
    """The family of the EC2 instance this is, from its firmware's product name; None elsewhere."""
    try:
        return FAMILIES.get(product.read_text().strip().split(".")[0])
    except OSError:
        return None


def stack_of(found: str) -> str | None:
    """Which runtime a version of torch-neuronx is; None for the public index's placeholder."""
    major, minor = (int(part) for part in found.split("+", 1)[0].split(".")[:2])
    if (major, minor) < (1, 13):
        return None
    return "neuron" if (major, minor) >= (2, 13) else "neuron-xla"


def check_installed(runtime: str) -> None:
    """Refuse to go on without the packages of ``runtime``.

    Raises:
        ConfigError: they are missing, the public index's placeholders, or those of the other runtime.
    """
    wanted = {"neuron": "torch-neuronx 2.13 or newer", "neuron-xla": "torch-neuronx 2.9 with torch-xla"}[runtime]
    try:
        found = version("torch-neuronx")
    except PackageNotFoundError:
        raise ConfigError(f"runtime {runtime} needs {wanted}: install it from {PIP_REPOSITORY}") from None
    stack = stack_of(found)
    if stack is None:
        raise ConfigError(
            f"torch-neuronx {found} is the public index's placeholder: uninstall it, and install {wanted} from "
            f"{PIP_REPOSITORY}"
        )
    if stack != runtime:
        raise ConfigError(
            f"torch-neuronx {found} is the runtime {stack}, and {runtime} needs {wanted}: use --runtime {stack}, or "
            "another environment; the two cannot share one"
        )


def check_degree(tp: int, family: InstanceFamily | None) -> None:
    """Refuse a degree over which the family's cores have no collective; without a family, one that no family has.

    Raises:
        DegreeError: with the degrees that would work.
    """
    if family is not None:
        if tp not in DEGREES[family]:
            raise DegreeError(f"{family} runs collectives over {_either(DEGREES[family])} cores, not over {tp}")
    elif tp not in (known := sorted(set().union(*DEGREES.values()))):
        raise DegreeError(f"no NeuronCores run collectives over {tp} cores: use --tp {_either(known)}")


def _either(numbers: Sequence[object]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def core_list(cores: Sequence[int]) -> str:
    """``(4, 5, 6)`` -> ``"4-6"``: neighbours, as NEURON_RT_VISIBLE_CORES takes them."""
    return f"{cores[0]}-{cores[-1]}" if len(cores) > 1 else str(cores[0])


def neff_folder(cache: Path, ports: tuple[int, int]) -> Path:
    """The folder below ``cache`` where TorchNeuron keeps what it compiles for the group that has ``ports``."""
    return cache / f"group-{ports[0]}"


def lock_folder(cache: Path, ports: tuple[int, int]) -> Path:
    """The folder below ``cache`` of the locks that TorchNeuron takes for it; apart, since no artifact carries locks."""
    return cache / f"locks-{ports[0]}"


Variables = dict[str, str | None]
"""Of a process's environment; None: must not be set."""


def shared_variables(topology: Topology, process: ProcessCores) -> Variables:
    """What both stacks read: the cores, where these meet, and where the compiler is.

    NEURON_RT_NUM_CORES may stay set: the runtime lets the list of cores win over it.
    """
    return {
        "NEURON_RT_VISIBLE_CORES": core_list(process.cores),
        "NEURON_RT_ROOT_COMM_ID": f"127.0.0.1:{process.ports[0]}",
        "NEURON_LOGICAL_NC_CONFIG": None if topology.lnc is None else str(topology.lnc),
        "PATH": path_with_tools(),
    }


def path_with_tools() -> str:
    """PATH with the interpreter's own folder first, where neuronx-cc is: both stacks look for it on PATH."""
    return os.pathsep.join((str(Path(sys.executable).parent), own_environment().get("PATH", os.defpath)))


def torchneuron_variables(topology: Topology, process: ProcessCores) -> Variables:
    """The cache is the group's own, see `neff_folder`, since an artifact carries all that is in it."""
    (rank,) = process.ranks
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(topology.tp),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(topology.tp),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(process.ports[1]),
        "TORCH_NEURONX_NEFF_CACHE_DIR": str(neff_folder(process.cache, process.ports)),
        # By default one folder of /tmp for all users of the machine.
        "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": str(lock_folder(process.cache, process.ports)),
        # Else a program that fails on the core is run operator by operator, with no more than a line in a log.
        "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1",
    }


def xla_variables(topology: Topology, process: ProcessCores) -> Variables:
    """A process loads programs and has no torch-xla device; the cache is the machine's, as artifacts carry programs."""
    return {
        # torch-xla would take the process for one of torchrun's, and choose its core anew, by LOCAL_RANK.
        "TORCHELASTIC_RUN_ID": None,
        "NEURON_COMPILE_CACHE_URL": str(process.cache),
    }


class NeuronPlatform:
    """NeuronCores with one of the two stacks; see `tpray.platforms.base.Platform`.

    Args:
        variables: of the environment, those that only this stack reads.
        layouts: see there; TorchNeuron has no single process, the XLA stack no public example of a process per rank.
    """

    resource = "neuron_cores"  # Ray counts logical cores, gives whole ones, and their ids to the actors
    resource_label = "NeuronCores"
    backends: tuple[str, ...] = ("torch_neuronx", "torch_xla", "libneuronxla")
    ray_assigns_cores = True
    loads_in_threads = True
    busy_limit_s = BUSY_LIMIT_S

    def __init__(
        self,
        name: str,
        runtime_class: str,
        packages: tuple[str, ...],
        variables: Callable[[Topology, ProcessCores], Variables],
        traces_on_cpu: bool,
        layouts: tuple[ProcessLayout, ...],
    ) -> None:
        self.name, self.runtime_class, self.packages, self._variables = name, runtime_class, packages, variables
        self.traces_on_cpu, self.layouts = traces_on_cpu, layouts

    def is_here(self) -> bool:
        if not (DEVICES / "neuron0").exists():
            return False
        try:
            return stack_of(version("torch-neuronx")) == self.name
        except PackageNotFoundError:
            return False

    def check(self, topology: Topology) -> None:
        family = topology.instance_family
        if topology.layout not in self.layouts:
            raise ConfigError("the single-process layout is neuron-xla's: use --neuron-layout process-per-rank")
        if (cores := topology.cores_per_rank) != 1:
            raise ConfigError(
                f"a rank of the runtime {self.name} has one NeuronCore, not {cores}: leave --cores-per-rank out"
            )
        check_degree(topology.tp, family)
        if family is None and self.traces_on_cpu:
            raise ConfigError(
                f"{self.name} compiles for one kind of NeuronCore, and this machine does not say which it has: name it "
                f"with --instance-family {_either(list(STACKS))}"
            )
        if family is not None and self.name not in (known := STACKS[family]):
            raise ConfigError(f"the runtime {self.name} does not know {family}'s cores: use --runtime {known[0]}")

    def check_model(self, model_type: str) -> None:
        if self.traces_on_cpu and (reason := NOT_LOWERED.get(model_type)) is not None:
            raise UnsupportedModelError(
                f"{model_type} does not run on {self.name}: {reason}; serve it with --runtime cpu"
            )

    def is_busy(self, error: BaseException) -> bool:
        return is_busy(error)

    def instance_family(self) -> InstanceFamily | None:
        return instance_family()

    def cores_per_rank(self, ranks: int) -> int:
        return 1

    def threads(self, cores_per_rank: int) -> int:
        return 1

    def facts(self, parallel: ParallelConfig) -> MachineFacts:
        family = parallel.instance_family or self.instance_family()
        if family is None:
            return MachineFacts(0, available_bytes())
        halves = 2 if family == "trn2" and parallel.lnc == 1 else 1
        devices = len(list(DEVICES.glob("neuron[0-9]*")))
        cores = devices * DEVICE_CORES[family] * halves
        return MachineFacts(cores, available_bytes(), CORE_BYTES[family] // halves, DEGREES[family])

    def choose_dtype(self, asked: DtypeName) -> str:
        """``auto`` is bfloat16, what NeuronCores multiply fastest."""
        if asked == "int8":
            raise ConfigError("NeuronCores are traced in bfloat16 or float32, not int8: use --dtype auto")
        return "bfloat16" if asked == AUTO else asked

    def default_buckets(self, max_length: int) -> tuple[Shape, ...]:
        """`DEFAULT_BUCKETS`, no longer than ``max_length``."""
        return tuple(sorted({(batch, min(length, max_length)) for batch, length in DEFAULT_BUCKETS}))

    def warm_up_shapes(self, max_length: int) -> tuple[Shape, ...]:
        return self.default_buckets(max_length)

    def traces_at_once(self, tp: int) -> int:
        """All, unless their compilers would not fit the memory together."""
        return max(1, min(tp, available_bytes() // COMPILER_BYTES)) if self.traces_on_cpu else tp

    def prepare_machine(self, process: ProcessCores) -> None:
        for folder in (neff_folder, lock_folder):  # an earlier group's
            shutil.rmtree(folder(process.cache, process.ports), ignore_errors=True)

    def environment(self, topology: Topology, process: ProcessCores) -> Variables:
        return shared_variables(topology, process) | self._variables(topology, process)

    def tracing_environment(self, cache: Path) -> Variables:
        """torch-xla's own CPU client takes the place of the cores.

        Source: torch-xla's PJRT notes; neuronx-distributed traces so, too (``cpu_backend=True``).
        """
        return {
            "PJRT_DEVICE": "CPU",
            "PATH": path_with_tools(),
            "TORCHELASTIC_RUN_ID": None,
            "NEURON_COMPILE_CACHE_URL": str(cache),
        }


NEURON = NeuronPlatform(
    "neuron", "tpray.runtime.neuron.torchneuron:NeuronRuntime", ("torch-neuronx", "neuronx-cc"),
    torchneuron_variables, traces_on_cpu=False, layouts=("process-per-rank",),
)  # fmt: skip
NEURON_XLA = NeuronPlatform(
    "neuron-xla", "tpray.runtime.neuron.xla:NeuronXlaRuntime",
    ("torch-neuronx", "torch-xla", "neuronx-cc", "libneuronxla"),
    xla_variables, traces_on_cpu=True, layouts=("process-per-rank", "single-process"),
)  # fmt: skip
