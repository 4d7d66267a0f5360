"""CPU cores: what they multiply natively, and how a machine's are shared out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tpray.config import AUTO, DtypeName, InstanceFamily, ProcessLayout
from tpray.errors import ConfigError
from tpray.platforms.base import ProcessCores, Shape
from tpray.platforms.cores import share_of_cores, usable_cores

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


def multiplies_bfloat16() -> bool:
    """Whether the cores multiply bfloat16 themselves (AVX512_BF16 or AMX), rather than by way of float32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def multiplies_int8() -> bool:
    """Whether the cores multiply 8-bit integers four at a time (VNNI or AMX)."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


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
        return share_of_cores(len(usable_cores()), ranks)

    def threads(self, cores_per_rank: int) -> int:
        return cores_per_rank

    def choose_dtype(self, asked: DtypeName) -> str:
        """``auto`` is bfloat16 where the cores multiply it natively, else float32."""
        able = [name for name, can in (("int8", multiplies_int8()), ("bfloat16", multiplies_bfloat16())) if can]
        if asked not in (AUTO, "float32", *able):
            lacks = {"int8": "no AVX512_VNNI, AVX_VNNI or AMX", "bfloat16": "no AVX512_BF16 or AMX"}[asked]
            raise ConfigError(
                f"this CPU does not multiply {asked} itself ({lacks}), which makes it slower than float32: use "
                f"--dtype {', '.join([*able, 'float32'])} or auto"
            )
        if asked == AUTO:
            return "bfloat16" if multiplies_bfloat16() else "float32"
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
