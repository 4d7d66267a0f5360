"""The protocol of a platform: what must be known of a kind of core before any process of a group starts.

Nothing in this package imports torch: importing it may load an accelerator's backend, which reads the environment
once, and a rank's environment is known only when Ray has said which cores it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tpray.config import DtypeName, InstanceFamily, ParallelConfig, ProcessLayout
from tpray.platforms.choose import MachineFacts

if TYPE_CHECKING:
    from tpray.platforms.topology import Topology

Shape = tuple[int, int]
"""[B, S]: rows, and tokens in each."""


@dataclass(frozen=True)
class ProcessCores:
    """What one process of a group is given where Ray hands out the cores.

    ranks: those it holds. cores: their ids on the machine, ascending. ports: two that the group has to itself.
    cache: a folder of this machine for what its compilers make.
    """

    ranks: Sequence[int]
    cores: Sequence[int]
    ports: tuple[int, int]
    cache: Path


class Platform(Protocol):
    """One kind of core. To add one: a file here, a row in `tpray.platforms.PLATFORMS`, and its runtime."""

    name: str
    """Of the runtime, as the user says it."""
    runtime_class: str
    """The `tpray.runtime.base.Runtime`, as ``module:Class``; imported in ranks only."""
    resource: str
    """Ray's resource of these cores."""
    resource_label: str
    """What a person calls several of them."""
    packages: tuple[str, ...]
    """Distributions, besides torch and transformers, whose versions shape a program."""
    backends: tuple[str, ...]
    """Modules that read the environment when they are imported, so that no process may import them before it is set."""
    ray_assigns_cores: bool
    """Whether Ray gives out core ids. If not, ranks are pinned to CPU cores that they lease."""
    traces_on_cpu: bool
    """Whether ranks trace on CPUs, in processes other than those that load: a machine without such cores can."""
    loads_in_threads: bool
    """Whether several ranks of one process may load their programs at once."""

    layouts: tuple[ProcessLayout, ...]
    """How ranks and processes may go together; where nobody says, the first is tried, and then the next."""
    busy_limit_s: float
    """How long cores may stay busy after the process that had them was killed, seconds."""

    def is_here(self) -> bool:
        """Whether this machine has such cores and what they need; the first such platform is ``auto``."""
        ...

    def check(self, topology: Topology) -> None:
        """Refuse what cannot work on these cores.

        Raises:
            DegreeError: collectives do not run over so many cores.
            ConfigError: another setting does not fit; the message names one that does.
        """
        ...

    def check_model(self, model_type: str) -> None:
        """Refuse an architecture that these cores' compiler cannot take.

        Raises:
            UnsupportedModelError: with the reason.
        """
        ...

    def is_busy(self, error: BaseException) -> bool:
        """Whether an error of a rank says that another process has its cores."""
        ...

    def instance_family(self) -> InstanceFamily | None:
        """The family of this machine, where programs are compiled for one."""
        ...

    def cores_per_rank(self, ranks: int) -> int:
        """How many cores a rank gets unless the user says; ranks: all those of the machine."""
        ...

    def threads(self, cores_per_rank: int) -> int:
        """CPU threads of a rank with so many cores."""
        ...

    def facts(self, parallel: ParallelConfig) -> MachineFacts:
        """What of this machine decides how many ranks and groups there are."""
        ...

    def choose_dtype(self, asked: DtypeName) -> str:
        """The dtype to trace in.

        Raises:
            ConfigError: the cores cannot compute in ``asked``; the message names what they can.
        """
        ...

    def default_buckets(self, max_length: int) -> tuple[Shape, ...]:
        """The shapes to trace for when nobody says which; none where a program takes any."""
        ...

    def warm_up_shapes(self, max_length: int) -> tuple[Shape, ...]:
        """What to run once before the first request, so that no request pays for a first time."""
        ...

    def traces_at_once(self, tp: int) -> int:
        """How many of ``tp`` ranks may trace at a time."""
        ...

    def prepare_machine(self, process: ProcessCores) -> None:
        """Remove what an earlier group left where this one will keep things; called before its processes begin."""
        ...

    def environment(self, topology: Topology, process: ProcessCores) -> dict[str, str | None]:
        """The variables of a process that is given cores by Ray; None: must not be set."""
        ...

    def tracing_environment(self, cache: Path) -> dict[str, str | None]:
        """The same of a process that only traces, where ``traces_on_cpu``. cache: as in `ProcessCores`."""
        ...
