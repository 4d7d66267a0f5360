"""How one group lies on its node: ranks, processes and cores, resolved once and then frozen.

A group is ``tp`` ranks. Each has ``cores_per_rank`` cores, and a process of its own or, on some platforms, a thread of
the one process that holds all cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tpray.config import AUTO, InstanceFamily, ParallelConfig, ProcessLayout
from tpray.platforms import platform_for
from tpray.platforms.base import Platform


@dataclass(frozen=True)
class Topology:
    """Where the ranks of one group are; everything below the edge takes this and asks nothing else.

    Args:
        tp: the tensor-parallel degree.
        runtime: the name of the platform, never ``auto``.
        cores_per_rank: cores of each rank.
        layout: a process for each rank, or one for all.
        fallback: the layout to go on with if ``layout`` fails when the group starts; None: there is none.
        instance_family: of the cores, where programs are compiled for one; None: not known, or not needed.
        lnc: physical NeuronCores in a logical one; None: Neuron's default.
        tracing: its ranks only trace, on CPUs, and take none of the cores; see `for_tracing`.
        fake: its ranks have no model; what they trace is kept apart from what is real.
        why: its degree was chosen, in a sentence; empty: the user has said it.
    """

    tp: int
    runtime: str = "cpu"
    cores_per_rank: int = 1
    layout: ProcessLayout = "process-per-rank"
    fallback: ProcessLayout | None = None
    instance_family: InstanceFamily | None = None
    lnc: int | None = None
    tracing: bool = False
    fake: bool = False
    why: str = field(default="", compare=False)

    @classmethod
    def of(cls, parallel: ParallelConfig, replicas: int = 1, why: str = "") -> Topology:
        """What a configuration says, with what this machine is where it does not say; an ``auto`` degree is 1.

        Args:
            replicas: how many groups share this machine's cores.
            why: see above; `tpray.artifacts.settle` chooses a degree.

        Raises:
            DegreeError, ConfigError: it cannot work on these cores; see `Platform.check`.
        """
        platform = platform_for(parallel.runtime)
        asked = parallel.neuron_layout if platform.ray_assigns_cores else AUTO
        layout, *others = platform.layouts if asked == AUTO else (asked,)
        tp = 1 if parallel.tp == AUTO else parallel.tp
        topology = cls(
            tp=tp,
            runtime=platform.name,
            cores_per_rank=parallel.cores_per_rank or platform.cores_per_rank(tp * replicas),
            layout=layout,
            fallback=others[0] if others and tp > 1 else None,  # a single rank is a single process
            instance_family=parallel.instance_family or platform.instance_family(),
            lnc=parallel.lnc,
            why=why,
        )
        platform.check(topology)
        return topology

    @property
    def platform(self) -> Platform:
        """The kind of core."""
        return platform_for(self.runtime)

    def for_tracing(self) -> Topology:
        """Of the ranks that trace for this group: others than those that load, where tracing takes no cores."""
        return replace(self, tracing=True) if self.platform.traces_on_cpu else self

    @property
    def on_assigned_cores(self) -> bool:
        """Whether Ray gives the ranks their cores."""
        return self.platform.ray_assigns_cores and not self.tracing

    @property
    def compiled_for(self) -> tuple[InstanceFamily | None, int | None]:
        """The instance family and logical core size that its programs are compiled for; (None, None) on CPUs."""
        return (self.instance_family, self.lnc) if self.platform.ray_assigns_cores else (None, None)

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""
        return self.platform.threads(self.cores_per_rank)

    @property
    def processes(self) -> list[range]:
        """The ranks of each process."""
        if self.on_assigned_cores and self.layout == "single-process":
            return [range(self.tp)]
        return [range(rank, rank + 1) for rank in range(self.tp)]

    def resources(self, ranks: int | None = None) -> dict[str, float]:
        """Ray's resources for so many of the group's ranks; the default is all of them."""
        count = self.tp if ranks is None else ranks
        cpus = {"CPU": float(count * self.threads)}
        if not self.on_assigned_cores:
            return cpus
        return cpus | {self.platform.resource: float(count * self.cores_per_rank)}
