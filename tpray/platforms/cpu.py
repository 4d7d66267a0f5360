"""CPU cores: what they multiply natively, and how a machine's are shared out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tpray.config import AUTO, DtypeName, InstanceFamily, ParallelConfig, ProcessLayout, environment
from tpray.errors import ConfigError
from tpray.platforms.base import ProcessCores, Shape
from tpray.platforms.choose import MachineFacts
from tpray.platforms.cores import core_count, share_of_cores
from tpray.platforms.memory import available_bytes

if TYPE_CHECKING:
    from tpray.platforms.topology import Topology


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction set extensions of this machine's cores, as Linux names them in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(named.partition(":")[2].split())


@cache
def cpu_model() -> str:
    """What this machine's cores are called, and how many there are; empty where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return f"{len(names)} x {names[0]}" if names else ""


_MULTIPLIED_BY: dict[DtypeName, tuple[str, ...]] = {
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
}
"""Which extensions multiply a dtype, the fastest dtype first; any core multiplies float32."""

_ONEDNN_LEVELS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16")
"""What oneDNN can be held to by ONEDNN_MAX_CPU_ISA, and its level where each extension begins to be used.

Source: oneDNN, "CPU Dispatcher Control".
"""
_BEGINS_AT = {"avx_vnni": "AVX2_VNNI", "avx512_vnni": "AVX512_CORE_VNNI", "avx512_bf16": "AVX512_CORE_BF16"}


def _withheld() -> set[str]:
    """The extensions that oneDNN is told not to use, to see how a lesser CPU would do; AMX is above all levels."""
    level = environment().get("ONEDNN_MAX_CPU_ISA", "").upper()
    if level not in _ONEDNN_LEVELS:
        return set()
    above = _ONEDNN_LEVELS[_ONEDNN_LEVELS.index(level) + 1 :]
    return {"amx_int8", "amx_bf16", *(flag for flag, begins in _BEGINS_AT.items() if begins in above)}


def native_dtypes() -> tuple[DtypeName, ...]:
    """The dtypes that the cores multiply themselves and oneDNN may, the fastest first; float32 is the last.

    int8 needs four products at a time (VNNI or AMX), bfloat16 AVX512_BF16 or AMX.
    """
    usable = cpu_flags() - _withheld()
    able: list[DtypeName] = [name for name, needs in _MULTIPLIED_BY.items() if usable.intersection(needs)]
    return (*able, "float32")


def _lacks(dtype: DtypeName) -> str:
    """What is wrong with a dtype that the cores do not multiply themselves."""
    if dtype == "int8":
        # Source: oneDNN, "Nuances of int8 Computations".
        return "has none of AVX512_VNNI, AVX_VNNI and AMX, without which sums of int8 products overflow"
    from tpray.platforms.measured import times_float32

    factor = times_float32(dtype)
    slower = "is slower than" if factor is None else f"takes {factor:.2g} times as long as"
    return f"does not multiply {dtype} itself (no AVX512_BF16 or AMX): a product {slower} in float32"


class CpuPlatform:
    """See `tpray.platforms.base.Platform`."""

    name = "cpu"
    runtime_class = "tpray.runtime.cpu.runtime:CpuRuntime"
    resource = "CPU"
    resource_label = "CPUs"
    packages: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    ray_assigns_cores = False
    traces_on_cpu = False
    loads_in_threads = False  # it uses torch.export, which is not safe in two threads
    layouts: tuple[ProcessLayout, ...] = ("process-per-rank",)
    busy_limit_s = 0.0

    def is_here(self) -> bool:
        return True

    def check(self, topology: Topology) -> None:
        """Any degree and layout works; the model's own limits are checked with the model."""

    def check_model(self, model_type: str) -> None:
        """Every architecture works."""

    def is_busy(self, error: BaseException) -> bool:
        """Never: CPU cores are leased before they are used, and shared where that is not possible."""
        return False

    def instance_family(self) -> InstanceFamily | None:
        return None

    def cores_per_rank(self, ranks: int) -> int:
        return share_of_cores(core_count(), ranks)

    def threads(self, cores_per_rank: int) -> int:
        return cores_per_rank

    def facts(self, parallel: ParallelConfig) -> MachineFacts:
        return MachineFacts(core_count(), available_bytes())

    def choose_dtype(self, asked: DtypeName) -> str:
        """``auto`` is bfloat16 where the cores multiply it natively, else float32."""
        able = native_dtypes()
        if asked not in (AUTO, *able):
            raise ConfigError(f"this CPU {_lacks(asked)}: use --dtype {', '.join(able)} or auto")
        if asked == AUTO:
            return "bfloat16" if "bfloat16" in able else "float32"
        return asked

    def default_buckets(self, max_length: int) -> tuple[Shape, ...]:
        return ()

    def warm_up_shapes(self, max_length: int) -> tuple[Shape, ...]:
        """oneDNN compiles a kernel per shape on first use; these cover the common ones."""
        lengths = [length for length in (16, 32, 64, 128) if length <= max_length] or [max_length]
        return tuple((batch, length) for length in lengths for batch in (1, 8))

    def traces_at_once(self, tp: int) -> int:
        return tp

    def prepare_machine(self, process: ProcessCores) -> None:
        """Nothing is kept."""

    def environment(self, topology: Topology, process: ProcessCores) -> dict[str, str | None]:
        return {}

    def tracing_environment(self, cache: Path) -> dict[str, str | None]:
        return {}
