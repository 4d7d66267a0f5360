"""Degrees, runs of cores, locks and environments: what is decided before any core is touched; and Ray's own ids."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpray import load
from tpray.artifacts.manifest import write_manifest
from tpray.artifacts.resolve import find_model
from tpray.config import DtypeName, ModelConfig, ParallelConfig, ServeConfig
from tpray.errors import ConfigError, DegreeError, PlacementError, UnsupportedModelError
from tpray.group import nodes as ray_nodes
from tpray.group import ray_executor
from tpray.group.nodes import matches, shortfall
from tpray.group.ray_executor import RayExecutor
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms import lease
from tpray.platforms.base import ProcessCores
from tpray.platforms.cores import is_aligned, is_run
from tpray.platforms.neuron import NEURON, NEURON_XLA, NOT_LOWERED, check_degree, instance_family, stack_of
from tpray.platforms.topology import Topology
from tpray.runtime.neuron import graph as neuron_graph
from tpray.runtime.neuron.graph import remove_stale_locks


def test_degrees_of_each_family() -> None:
    check_degree(24, "inf2")
    with pytest.raises(DegreeError, match="1, 2, 4, 8 or 24 cores, not over 16"):
        check_degree(16, "inf2")
    with pytest.raises(DegreeError, match="use --tp 1, 2, 4, 8, 16, 24, 32 or 64"):
        check_degree(3, None)


def test_runs() -> None:
    assert is_run([3, 4, 5])
    assert not is_run([3, 5])
    assert is_aligned([4, 5])
    assert not is_aligned([3, 4])


@pytest.mark.parametrize(
    ("found", "stack"),
    [("1.0", None), ("1.13.1.1.9", "neuron-xla"), ("2.9.0.2.15.32035", "neuron-xla"), ("2.13.3.0", "neuron")],
)
def test_which_runtime_a_version_is(found: str, stack: str | None) -> None:
    assert stack_of(found) == stack


def test_the_family_is_the_firmwares_word(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("trn1n.32xlarge\n")
    assert instance_family(tmp_path / "name") == "trn1"
    (tmp_path / "name").write_text("c7i.large\n")
    assert instance_family(tmp_path / "name") is None
    assert instance_family(tmp_path / "absent") is None


def test_the_environment_of_a_rank_and_of_a_process_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    process = ProcessCores(range(1, 2), [5], (61100, 61101), Path("/c"))
    for platform in (NEURON, NEURON_XLA):
        rank = platform.environment(Topology(2, platform.name, lnc=2), process)
        assert rank["NEURON_RT_VISIBLE_CORES"] == "5"
        assert rank["NEURON_RT_ROOT_COMM_ID"] == "127.0.0.1:61100"
        assert rank["NEURON_LOGICAL_NC_CONFIG"] == "2"
        assert rank["PATH"] == "/venv/bin:/usr/bin", "where the compiler of this environment is"
    rank = NEURON.environment(Topology(2, "neuron"), process)
    assert (rank["RANK"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_PORT"]) == ("1", "2", "61101")
    both = NEURON_XLA.environment(Topology(2, "neuron-xla"), ProcessCores(range(2), [4, 5], (61100, 61101), Path("/c")))
    assert both["NEURON_RT_VISIBLE_CORES"] == "4-5"
    assert "RANK" not in both


def test_each_stack_has_variables_of_its_own() -> None:
    process = ProcessCores(range(1, 2), [5], (61100, 61101), Path("/c"))
    native, xla = (p.environment(Topology(2, p.name), process) for p in (NEURON, NEURON_XLA))
    own = {name: value for name, value in native.items() if name.startswith("TORCH_NEURONX")}
    assert own == {
        "TORCH_NEURONX_NEFF_CACHE_DIR": "/c/group-61100",
        "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": "/c/locks-61100",
        "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1",
    }
    assert xla["TORCHELASTIC_RUN_ID"] is None
    assert "TORCHELASTIC_RUN_ID" not in native
    assert not any("PJRT" in name or name.startswith(("RANK", "TORCH_NEURONX")) for name in xla), "it only loads"
    tracing = NEURON_XLA.tracing_environment(Path("/c"))
    assert tracing["PJRT_DEVICE"] == "CPU"
    assert "NEURON_RT_VISIBLE_CORES" not in tracing


def test_a_lock_that_nobody_can_hold_is_removed_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A locked one, a new one, and one that a compiler, which runs, may have made."""
    stale, held, new, later = (tmp_path / name / "model.lock" for name in ("stale", "held", "new", "later"))
    now = time.time()
    for path, age_s in ((stale, 600), (held, 600), (new, 1), (later, 90)):
        path.parent.mkdir()
        path.touch()
        os.utime(path, (now - age_s, now - age_s))
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_stale_locks(tmp_path / "stale") == [stale]
        stale.touch()
        os.utime(stale, (now - 600, now - 600))
        compiler = subprocess.Popen([sys.executable, "-c", "input()", "neuronx-cc compile"], stdin=subprocess.PIPE)
        try:
            give_up = time.monotonic() + 30
            while (started := neuron_graph._oldest_compiler()) == float("inf"):  # until it has its name
                assert time.monotonic() < give_up
            assert now - 5 < started < now + 60
            os.utime(later, (started + 1, started + 1))
            monkeypatch.setattr(neuron_graph, "LOCK_GRACE_S", -60)  # else its age alone would save it
            assert remove_stale_locks(tmp_path / "later") == []
            monkeypatch.undo()
            assert remove_stale_locks(tmp_path) == [stale]
        finally:
            compiler.communicate(b"\n")
    assert [path.exists() for path in (held, new, later)] == [True] * 3


def test_two_groups_never_take_one_port() -> None:
    first, second = lease.take_ports(2, lease.GROUP_PORTS), lease.take_ports(2, lease.GROUP_PORTS)
    assert set(first.ids).isdisjoint(second.ids)
    first.release()
    third = lease.take_ports(2, lease.GROUP_PORTS)
    assert third.ids == first.ids
    third.release()
    second.release()


def test_a_group_that_no_node_can_hold_is_named() -> None:
    topology = Topology(8, "neuron-xla", instance_family="trn1")
    node = {"Alive": True, "Resources": {"CPU": 64.0, "neuron_cores": 2.0}}
    assert shortfall(topology, [node | {"Resources": {"CPU": 8.0, "neuron_cores": 8.0}}]) is None
    assert "needs 8 CPUs and 8 NeuronCores on one node" in str(shortfall(topology, [node]))
    dead = node | {"Alive": False, "Resources": {"CPU": 64.0, "neuron_cores": 32.0}}
    assert "no node of this Ray has more than 64 CPUs and 2 NeuronCores:" in str(shortfall(topology, [node, dead]))
    other = node | {"Resources": {"CPU": 4.0, "neuron_cores": 8.0}}
    assert "4 CPUs and 8 NeuronCores or 64 CPUs and 2 NeuronCores" in str(shortfall(topology, [node, other]))


def test_labels_that_no_node_has_are_named() -> None:
    topology = Topology(8, "neuron-xla", instance_family="trn1")
    nodes = [
        {"Alive": True, "Labels": {"family": "inf2"}, "Resources": {"CPU": 96.0, "neuron_cores": 12.0}},
        {"Alive": True, "Labels": {"family": "trn1"}, "Resources": {"CPU": 8.0, "neuron_cores": 2.0}},
    ]
    assert shortfall(topology, nodes, {}) is None
    assert shortfall(topology, nodes, {"family": "!trn1"}) is None
    too_small = str(shortfall(topology, nodes, {"family": "trn1"}))
    assert "on one node with the labels family=trn1, and no such node of this Ray has more than 8 CPUs" in too_small
    assert "and no node of this Ray has these" in str(shortfall(topology, nodes, {"family": "in(trn2,trn3)"}))
    assert ServeConfig(node_labels={"family": "in(trn2, trn3)"}).node_labels == {"family": "in(trn2,trn3)"}


@pytest.mark.parametrize(("runtime", "limit_s"), [("neuron", 60.0), ("neuron-xla", 60.0), ("cpu", 10.0)])
def test_the_end_of_a_killed_rank_is_waited_for_as_long_as_its_cores_may_be_busy(
    runtime: str, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    async def gone(pid: int, fd: int, timeout_s: float) -> None:
        limits.append(timeout_s)

    monkeypatch.setattr(ray_executor, "_wait_gone", gone)
    executor = RayExecutor(Topology(2, runtime))
    executor._remember([os.getpid()])
    asyncio.run(executor.kill())
    assert limits == [limit_s]


def test_a_configuration_becomes_a_topology() -> None:
    parallel = ParallelConfig(tp=8, runtime="neuron-xla", instance_family="trn1", neuron_layout="single-process")
    topology = Topology.of(parallel)
    assert topology.resources() == {"CPU": 8.0, "neuron_cores": 8.0}
    assert topology.processes == [range(8)]
    assert topology.compiled_for == ("trn1", None)
    assert Topology.of(ParallelConfig(tp=2, runtime="cpu", instance_family="trn1")).compiled_for == (None, None)


@pytest.mark.parametrize(
    ("parallel", "dtype", "words"),
    [
        ({"tp": 4, "runtime": "neuron-xla", "instance_family": "trn1"}, "auto", "over 1, 2, 8, 16 or 32 cores, not"),
        ({"tp": 2, "runtime": "neuron", "instance_family": "inf2"}, "auto", "use --runtime neuron-xla"),
        ({"tp": 2, "runtime": "neuron"}, "int8", "bfloat16 or float32, not int8"),
        ({"tp": 2, "runtime": "neuron", "neuron_layout": "single-process"}, "auto", "layout is neuron-xla's"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_placed(
    parallel: dict[str, Any], dtype: DtypeName, words: str, make_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(make_checkpoint(), dtype=dtype, **parallel)  # this test cannot start Ray
    if dtype == "auto":
        from tpray.serving.app import build

        with pytest.raises(ConfigError, match=words):
            build(ServeConfig.model_validate({"parallel": parallel}))


@pytest.mark.parametrize("runtime", ["neuron", "neuron-xla"])
def test_several_cores_for_a_rank_are_refused(runtime: str) -> None:
    with pytest.raises(ConfigError, match=f"a rank of the runtime {runtime} has one NeuronCore, not 2"):
        Topology.of(ParallelConfig(tp=2, runtime=runtime, cores_per_rank=2, instance_family="trn2"))
    single = ParallelConfig(tp=2, runtime=runtime, cores_per_rank=1, instance_family="trn2")
    assert Topology.of(single).cores_per_rank == 1


def test_an_unknown_family_and_architectures_that_torch_xla_cannot_lower_are_refused(
    make_checkpoint: Callable[..., Path],
) -> None:
    """Before anything is placed or traced."""
    with pytest.raises(ConfigError, match="name it with --instance-family inf2, trn1 or trn2"):
        Topology.of(ParallelConfig(tp=2, runtime="neuron-xla"))
    topology = Topology(2, "neuron-xla", instance_family="trn1")
    for model_type, reason in NOT_LOWERED.items():
        with pytest.raises(UnsupportedModelError, match=f"{model_type} does not run on neuron-xla: {reason}"):
            find_model(ModelConfig(source=str(make_checkpoint(model_type))), topology)
    with pytest.raises(ConfigError, match="reads padding, so that its rows cannot be padded to buckets: serve it with"):
        find_model(ModelConfig(source=str(make_checkpoint("nystromformer"))), topology)


def test_an_artifact_for_another_family_or_runtime_is_refused(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    out = tmp_path / "artifact"
    with load(make_checkpoint(), dtype="float32", out=out, executor=ThreadExecutor(1)) as classifier:
        artifact = classifier.group.artifact
    for_inf2 = {"runtime": "neuron-xla", "instance_family": "inf2"}
    write_manifest(out, artifact.manifest.model_copy(update=for_inf2))
    model = ModelConfig(source=str(out))
    assert find_model(model, Topology(1, "neuron-xla", instance_family="inf2"))
    with pytest.raises(ConfigError, match="was traced for the runtime neuron-xla"):
        find_model(model, Topology(1, "neuron"))
    with pytest.raises(ConfigError, match="compiled for the instance family inf2, and this is trn1: trace the model"):
        find_model(model, Topology(1, "neuron-xla", instance_family="trn1"))
    write_manifest(out, artifact.manifest.model_copy(update=for_inf2 | {"lnc": 1}))
    with pytest.raises(ConfigError, match="logical NeuronCores of 1: use --lnc 1"):
        find_model(model, Topology(1, "neuron-xla"))
    assert find_model(model, Topology(1, "neuron-xla", lnc=1))


@pytest.fixture
def ray_with_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    from tpray.local_ray.local import start_ray, stop_ray

    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", f'{{"neuron_cores": {request.param}}}')
    start_ray(8)
    yield
    stop_ray()


def hold(count: int) -> list[Any]:
    """Actors with a NeuronCore each, the lowest that are free, in order."""
    import ray

    from tpray.group.worker_host import WorkerHost

    held: list[Any] = []
    for _ in range(count):
        held.append(ray.remote(WorkerHost).options(num_cpus=0, resources={"neuron_cores": 1}).remote())
        ray.get(held[-1].cores.remote("neuron_cores"))
    return held


@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [8], indirect=True)
def test_a_gap_in_rays_ids_is_placed_around(ray_with_cores: None) -> None:
    """With 0 and 2 taken Ray gives 1 and 3, or 3 and 4; the group ends on an aligned pair, and holds nothing else."""
    import ray

    held = hold(3)
    ray.kill(held.pop(1))

    async def spawn() -> list[tuple[int, ...]]:
        ranks = RayExecutor(Topology(2, "neuron", instance_family="trn2"))
        await ranks.place()
        try:
            infos = await ranks.spawn()
            assert infos[0].pid != infos[1].pid
            return [info.cores for info in infos]
        finally:
            await ranks.kill()
            ranks.release()

    assert asyncio.run(spawn()) in ([(4,), (5,)], [(6,), (7,)])
    free = [ray.get(actor.cores.remote("neuron_cores"), timeout=30) for actor in hold(6)]
    assert sorted(free) == [(1,), (3,), (4,), (5,), (6,), (7,)], "nothing else is held"


@pytest.fixture
def in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kubernetes' device plugin sets in a pod with the second chip of a node."""
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2,3")


@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [2], indirect=True)
def test_in_a_pod_ray_gives_the_cores_that_are_listed(in_a_pod: None, ray_with_cores: None) -> None:
    async def spawn() -> list[tuple[int, ...]]:
        ranks = RayExecutor(Topology(2, "neuron", instance_family="trn2"))
        await ranks.place()
        try:
            return [info.cores for info in await ranks.spawn()]
        finally:
            await ranks.kill()
            ranks.release()

    assert asyncio.run(spawn()) == [(2,), (3,)]


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [8], indirect=True)
def test_a_replica_with_a_gap_places_its_group_beside_it(ray_with_cores: None) -> None:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Replica:
        """What a Serve replica is to its group: an actor within the placement group that has the group's cores."""

        async def spawn(self) -> list[tuple[int, ...]]:
            ranks = RayExecutor(Topology(2, "neuron", instance_family="trn2"))
            await ranks.place()
            try:
                return [info.cores for info in await ranks.spawn()]
            finally:
                await ranks.kill()
                ranks.release()

    held = hold(3)
    ray.kill(held.pop(1))
    bundle = placement_group([{"CPU": 2, "neuron_cores": 2}])
    ray.get(bundle.ready())
    strategy = PlacementGroupSchedulingStrategy(bundle, 0, placement_group_capture_child_tasks=True)
    replica: Any = ray.remote(Replica).options(num_cpus=0, scheduling_strategy=strategy).remote()
    found = ray.get(replica.spawn.remote(), timeout=60)
    assert found in ([(3,), (4,)], [(4,), (5,)], [(6,), (7,)]), "neighbours, whatever Ray gave the replica"


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [2], indirect=True)
def test_a_deployment_that_no_node_can_hold_is_refused(
    ray_with_cores: None, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpray.serving.app import build

    monkeypatch.setattr(ray_nodes, "NODE_PATIENCE_S", 2)  # there is no autoscaler that would start one
    model = {"source": str(make_checkpoint(num_attention_heads=8))}
    args = {"model": model, "parallel": {"tp": 8, "runtime": "neuron-xla", "instance_family": "trn1"}}
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"8 NeuronCores on one node.* more than .* 2 NeuronCores.*none has come"):
        build(ServeConfig.model_validate(args))
    assert time.monotonic() - started < 60


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node that the autoscaler started has: the labels of its type, here of one."""
    monkeypatch.setenv("RAY_OVERRIDE_LABELS", '{"instance-family": "inf2"}')


@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [2], indirect=True)
def test_the_labels_of_nodes_are_read_as_ray_reads_them(labelled: None, ray_with_cores: None) -> None:
    import ray
    from ray.util.placement_group import placement_group

    values = ["inf2", "trn1", "!inf2", "!trn1", "in(trn1,inf2)", "in(trn1,trn2)", "!in(trn1,inf2)", "!in(trn1)"]
    selectors = [{"instance-family": value} for value in values]
    selectors += [{"zone": "a"}, {"zone": "!a"}, {"instance-family": "inf2", "zone": "in(a,b)"}]
    (node,) = ray.nodes()
    read = [matches(node["Labels"], selector) for selector in selectors]
    groups = [placement_group([{"CPU": 0.01}], bundle_label_selector=[selector]) for selector in selectors]
    assert all(group.wait(30) for group, suits in zip(groups, read, strict=True) if suits)
    assert not any(group.wait(0.2) for group, suits in zip(groups, read, strict=True) if not suits)
    assert read == [True, False, False, True, True, False, False, True, False, True, False]


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [2], indirect=True)
def test_a_deployment_waits_for_a_node_with_its_labels(
    labelled: None, ray_with_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpray.serving.app import build

    monkeypatch.setattr(ray_nodes, "NODE_PATIENCE_S", 2)  # there is no autoscaler that would start one
    parallel = {"tp": 2, "runtime": "neuron-xla", "instance_family": "inf2"}

    def labels(**wanted: str) -> ServeConfig:
        return ServeConfig.model_validate({"parallel": parallel, "node_labels": wanted})

    bound: Any = build(labels(**{"instance-family": "inf2"}))
    options = bound._bound_deployment._replica_config
    assert options.placement_group_bundle_label_selector == [{"instance-family": "inf2"}]
    with pytest.raises(PlacementError, match=r"no node of this Ray has these.*none has come in"):
        build(labels(**{"instance-family": "trn1"}))
    with pytest.raises(ConfigError, match="node_labels: Invalid label selector value"):
        build(labels(**{"instance-family": "in("}))


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.parametrize("ray_with_cores", [4], indirect=True)
def test_cores_without_neighbours_are_refused(ray_with_cores: None) -> None:
    import ray

    held = hold(3)
    ray.kill(held.pop(1))

    async def spawn() -> None:
        ranks = RayExecutor(Topology(2, "neuron", instance_family="trn2"))
        await ranks.place()
        try:
            await ranks.spawn()
        finally:
            await ranks.kill()
            ranks.release()

    with pytest.raises(PlacementError, match="are not neighbours"):
        asyncio.run(spawn())
