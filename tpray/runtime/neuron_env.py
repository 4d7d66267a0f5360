"""What a Neuron process must know before it imports anything of Neuron, and what kind of cores this machine has.

Nothing here imports torch, since importing torch may load Neuron's backend, which reads the environment once.

Two stacks carry the distribution name ``torch-neuronx``, and one environment holds one of them: TorchNeuron (2.13 and
newer: Trn2, Trn3) is the runtime ``neuron``; the XLA one (up to 2.9: Inf2, Trn1, Trn2) is ``neuron-xla``.

Sources: Neuron's runtime configuration guide (NEURON_RT_*), torch-xla's PJRT notes (NEURON_PJRT_*),
https://docs.pytorch.org/docs/stable/elastic/run.html (RANK and its like).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tpray.config import InstanceFamily, RuntimeName
from tpray.errors import ConfigError

DMI = Path("/sys/devices/virtual/dmi/id/product_name")
DEVICES = Path("/dev")
FAMILIES: dict[str, InstanceFamily] = {"inf2": "inf2", "trn1": "trn1", "trn1n": "trn1", "trn2": "trn2", "trn2u": "trn2"}
STACKS: dict[InstanceFamily, tuple[RuntimeName, ...]] = {
    "inf2": ("neuron-xla",),
    "trn1": ("neuron-xla",),
    "trn2": ("neuron", "neuron-xla"),
}
"""Which runtimes know the cores of a family, the better one first."""

PIP_REPOSITORY = "the Neuron pip repository that AWS's setup guide names"
PACKAGES = {"neuron": ("torch-neuronx",), "neuron-xla": ("torch-neuronx", "torch-xla", "neuronx-cc", "libneuronxla")}
"""What shapes a compiled program, besides torch and transformers."""


@dataclass(frozen=True)
class NeuronPlace:
    """Where a rank's cores are.

    family: of the instance; None: not known. lnc: physical cores in a logical one; None: the default.
    first_core: the number of the rank's first core in a process that holds all ranks; None: the process is one rank's.
    """

    family: InstanceFamily | None = None
    lnc: int | None = None
    first_core: int | None = None


def instance_family(product: Path = DMI) -> InstanceFamily | None:
    """The family of the EC2 instance this is, from its firmware's product name; None elsewhere."""
    try:
        return FAMILIES.get(product.read_text().strip().split(".")[0])
    except OSError:
        return None


def stack_of(found: str) -> RuntimeName | None:
    """Which runtime a version of torch-neuronx is; None for the public index's placeholder."""
    major, minor = (int(part) for part in found.split("+", 1)[0].split(".")[:2])
    if (major, minor) < (1, 13):
        return None
    return "neuron" if (major, minor) >= (2, 13) else "neuron-xla"


def check_installed(runtime: RuntimeName) -> None:
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


def detect() -> RuntimeName:
    """What ``auto`` means on this machine: a Neuron runtime where there are cores and its packages, else the CPU."""
    if not (DEVICES / "neuron0").exists():
        return "cpu"
    try:
        return stack_of(version("torch-neuronx")) or "cpu"
    except PackageNotFoundError:
        return "cpu"


def core_list(cores: Sequence[int]) -> str:
    """``(4, 5, 6)`` -> ``"4-6"``: neighbours, as NEURON_RT_VISIBLE_CORES takes them."""
    return f"{cores[0]}-{cores[-1]}" if len(cores) > 1 else str(cores[0])


def neff_cache(cache: Path, ports: tuple[int, int]) -> Path:
    """The folder below ``cache`` where TorchNeuron keeps what it compiles for the group that has ``ports``."""
    return cache / f"group-{ports[0]}"


def environment(
    cores: Sequence[int], ranks: Sequence[int], tp: int, ports: tuple[int, int], lnc: int | None, cache: Path
) -> dict[str, str | None]:
    """The variables of the process that holds ``ranks`` on ``cores``; None: must not be set.

    ports: of the runtime's own rendezvous and of torch.distributed's, the same for all ranks of the group and for no
    other group of the machine. cache: of what is compiled. TorchNeuron's is the group's own, see `neff_cache`, since an
    artifact carries all that is in it; the XLA stack's, whose artifacts carry it already, is the machine's.
    """
    set_to: dict[str, str | None] = {
        "NEURON_RT_VISIBLE_CORES": core_list(cores),
        "NEURON_RT_NUM_CORES": None,  # it would compete with the list
        "NEURON_RT_ROOT_COMM_ID": f"127.0.0.1:{ports[0]}",
        "NEURON_LOGICAL_NC_CONFIG": None if lnc is None else str(lnc),
        "TORCHELASTIC_RUN_ID": None,  # would make torch-neuronx wait for an agent that is not there
        "TORCH_NEURONX_NEFF_CACHE_DIR": str(neff_cache(cache, ports)),
        "NEURON_COMPILE_CACHE_URL": str(cache),
    }
    if len(ranks) == 1:
        set_to |= {
            "RANK": str(ranks[0]),
            "WORLD_SIZE": str(tp),
            "LOCAL_RANK": str(ranks[0]),
            "LOCAL_WORLD_SIZE": str(tp),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(ports[1]),
            "PJRT_DEVICE": "NEURON",
            "NEURON_PJRT_PROCESS_INDEX": str(ranks[0]),
            "NEURON_PJRT_PROCESSES_NUM_DEVICES": ",".join(["1"] * tp),
        }
    return set_to
